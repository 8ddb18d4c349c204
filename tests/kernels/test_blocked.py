"""The blocked forms against `block`, which any equation goes through: outputs, states and every gradient."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from linearize_kernels import bidirectional, chunked
from linearize_kernels.ops.bidirectional import by_block as encode_by_block
from linearize_kernels.ops.chunked import run_segment
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap
from odd_layer import layer, tokens
from torch.nn.utils.parametrize import register_parametrization

from linearize_cli.methods.registry import load_recipe

METHODS = ["augmented", "augmented:relu", "augmented:performer", "augmented:flash", "flash", "window"]


def by_block(attention, state, q, k, v):
    state = state or attention.empty_state(q.shape[0], q.device, k.dtype)
    return run_segment(attention, state, None, q, k, v, None, None, 7, in_step=False)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lengths", [(1,), (3, 2, 1, 5), (30,), (13, 1, 29), (64, 3)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_outputs_states_and_gradients_are_those_of_block(name, lengths, chunk):
    attention = layer(name)
    inputs, learned, towards = tokens(sum(lengths)), None, None
    results = []
    for run in (by_block, lambda *tokens: chunked(*tokens, chunk=chunk)):
        state, outputs = None, []
        for piece in zip(*(x.split(lengths, -2) for x in inputs), strict=True):
            out, state = run(attention, state, *piece)
            outputs.append(out)
        found = [torch.cat(outputs, -2), *vars(state).values()]
        learned = learned or [i for i, x in enumerate(found) if x.requires_grad and x.numel()]
        # What nothing was folded into yet depends on no input.
        ends = [found[i] + 0 * inputs[0].sum() for i in learned]
        towards = towards or [torch.randn_like(x) for x in ends]
        wanted = [*inputs, *attention.parameters()]
        grads = torch.autograd.grad(ends, wanted, towards, allow_unused=True, materialize_grads=True)
        results.append([*found, *grads])
    assert attention.ran == ("torch" if sum(lengths) > 4 else "block")
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_computed_again_in_the_backward(name, monkeypatch):
    """Several segments, from a state with a count of its own."""
    attention, inputs, results = layer(name), tokens(101), []
    for stored in (1 << 20, 0):
        monkeypatch.setattr("linearize_kernels.ops.chunked.STORED", stored)
        first, second = zip(*(x.split((11, 90), -2) for x in inputs), strict=True)
        _, state = chunked(attention, None, *first)
        out, state = chunked(attention, state, *second, segment=32)
        wanted = [*inputs, *attention.parameters()]
        ends = (out.square().sum(), state.S.sum(), state.z.sum())
        results.append(torch.autograd.grad(sum(ends), wanted, allow_unused=True, materialize_grads=True))
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_no_features_are_asked_of_tokens_that_are_not_there(monkeypatch):
    """Check a feature map that is not a number at zero."""

    class Unsafe(FeatureMap):
        positive = True

        def forward(self, x):
            return (x / x.norm(dim=-1, keepdim=True)).relu()

    monkeypatch.setitem(FEATURE_MAPS, "unsafe", Unsafe)
    far = load_recipe("augmented").to_dict()["attention"]["far"] | dict(feature_map="unsafe")
    attention, inputs = layer("augmented", far=far), tokens(41)
    out = chunked(attention, None, *inputs)[0]
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


class Called(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *tokens):
        return chunked(self.attention, None, *tokens)[0]


def test_the_backward_knows_the_parameters_of_its_forward():
    inputs, other = tokens(40), layer("augmented")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    own, module = dict(Called(other).named_parameters()), Called(layer("augmented"))
    given = {name: x.detach().requires_grad_() for name, x in own.items()}
    out = torch.func.functional_call(module, given, tuple(inputs))
    found = torch.autograd.grad(out.square().sum(), [*inputs, *given.values()])
    expected = torch.autograd.grad(Called(other)(*inputs).square().sum(), [*inputs, *own.values()])
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", ["conv", "combine.mix", "far.key_weight", "far.q_map.weight"])
def test_parametrized_parameters_learn(name):
    attention, inputs = layer("augmented"), tokens(40)
    module, _, own = name.rpartition(".")
    register_parametrization(attention.get_submodule(module), own, Twice())
    wanted = [*inputs, *attention.parameters()]
    expected = torch.autograd.grad(by_block(attention, None, *inputs)[0].square().sum(), wanted)
    found = torch.autograd.grad(chunked(attention, None, *inputs)[0].square().sum(), wanted)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_chunks_of_one_row(kv_heads):
    attention, inputs = layer("augmented", kv_heads=kv_heads), tokens(13, kv_heads=kv_heads)
    expected = torch.autograd.grad(by_block(attention, None, *inputs)[0].square().sum(), inputs)
    found = torch.autograd.grad(chunked(attention, None, *inputs, chunk=1)[0].square().sum(), inputs)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_a_map_without_gradients(monkeypatch):
    class Signs(FeatureMap):
        positive = True

        def forward(self, x):
            return (x > 0).to(x.dtype)

    monkeypatch.setitem(FEATURE_MAPS, "signs", Signs)
    far = load_recipe("augmented").to_dict()["attention"]["far"] | dict(feature_map="signs")
    attention, inputs = layer("augmented", far=far), tokens(40)
    wanted = [*inputs, *attention.parameters()]
    expected = torch.autograd.grad(by_block(attention, None, *inputs)[0].square().sum(), wanted)
    found = torch.autograd.grad(chunked(attention, None, *inputs)[0].square().sum(), wanted)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_threads_train_one_layer():
    module, inputs = Called(layer("augmented")), [tokens(length) for length in (37, 50)]
    own = list(module.parameters())

    def gradients(given):
        return torch.autograd.grad(module(*given).square().sum(), [*given, *own])

    expected = [gradients(given) for given in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gradients, inputs * 8))
    assert all(a is b for a, b in zip(module.parameters(), own, strict=True))
    for results, wanted in zip(found, expected * 8, strict=True):
        for pair in zip(results, wanted, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["augmented", "augmented:relu", "augmented:flash"])
def test_autocast_changes_nothing(name):
    attention, inputs = layer(name).float(), [x.detach().float().requires_grad_() for x in tokens(40)]
    found = []
    for narrowed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrowed):
            out = chunked(attention, None, *inputs)[0]
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_parameters_in_bfloat16_have_gradients_summed_in_fp32():
    exact, attention = layer("augmented"), layer("augmented").bfloat16()
    exact.load_state_dict(attention.double().state_dict())
    attention.bfloat16()
    inputs = [x.detach() for x in tokens(400)]
    for given in (exact, attention):
        chunked(given, None, *(x.to(given.conv.dtype) for x in inputs))[0].float().square().sum().backward()
    for wide, narrow in zip(exact.parameters(), attention.parameters(), strict=True):
        assert (narrow.grad - wide.grad).norm() < 0.02 * wide.grad.norm()


@pytest.mark.parametrize("size, chunk", [(6, 32), (33, 64), (96, 128), (500, 128)])
def test_chunks_are_powers_of_two(size, chunk):
    """Triton's kernels take no others."""
    assert layer("augmented", size=size).equation.chunk == chunk


@pytest.mark.parametrize("name", ["augmented", "augmented:relu"])
def test_a_chunk_of_nothing_but_absent_slots(name):
    """The first rows and the sinks fill more than the first chunk."""
    attention = layer(name, size=4, width=3, sinks=5)
    inputs = tokens(9)
    expected = by_block(attention, None, *inputs)[0]
    torch.testing.assert_close(chunked(attention, None, *inputs, chunk=4)[0], expected)


@pytest.mark.parametrize("feature_map", ["hedgehog", "taylor"])
@pytest.mark.parametrize("frozen", ["attention.far.k_map", "attention.far", "attention.conv", "attention"])
def test_frozen_parameters_change_no_other_gradient(frozen, feature_map):
    far = load_recipe("augmented").to_dict()["attention"]["far"] | dict(
        feature_map=feature_map, feature_dim=4
    )
    inputs, module = tokens(40), Called(layer("augmented", far=far))
    every = [*inputs, *module.parameters()]
    expected = torch.autograd.grad(module(*inputs).square().sum(), every)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    wanted = [x for x in every if x.requires_grad]
    found = torch.autograd.grad(module(*inputs).square().sum(), wanted)
    left = [gradient for x, gradient in zip(every, expected, strict=True) if x.requires_grad]
    assert len(inputs) <= len(found) < len(every)
    for pair in zip(found, left, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {}) for name in ("augmented", "augmented:relu", "augmented:performer", "window")),
        ("augmented", dict(size=1, sinks=1, width=1)),
        ("augmented", dict(sinks=0, width=4, kv_heads=4)),
        ("augmented", dict(width=22, kv_heads=1)),
        ("augmented", dict(width=0)),
        ("augmented", dict(size=40)),
        ("window", dict(sinks=0, width=22)),
    ],
)
@pytest.mark.parametrize("length", [4, 5, 13, 37, 101])
@pytest.mark.parametrize("chunk", [None, 7])
def test_encoders_are_those_of_block(name, changes, length, chunk):
    attention = layer(name, causal=False, **changes)
    inputs, results = tokens(length, kv_heads=attention.equation.kv_heads), []
    wanted = [*inputs, *attention.parameters()]
    for out in (encode_by_block(attention, *inputs), bidirectional(attention, *inputs, chunk=chunk)):
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        grads = torch.autograd.grad(out, wanted, towards, allow_unused=True, materialize_grads=True)
        results.append([out, *grads])
    assert attention.ran == "torch"
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_encoders_with_pads_between_tokens_go_through_block():
    attention = layer("augmented", causal=False)
    q, k, v = tokens(20)
    valid = (torch.arange(20) < torch.tensor([20, 15, 3])[:, None]) & (torch.arange(20) != 7)
    out = bidirectional(attention, q, k, v, valid)
    assert attention.ran == "block"
    alone = bidirectional(attention, *(x[1:2, :, valid[1]] for x in (q, k, v)))
    assert attention.ran == "torch"
    torch.testing.assert_close(out[1:2, :, valid[1]], alone)
    attention.impl = "triton"
    with pytest.raises(ValueError, match="without pads"):
        bidirectional(attention, q, k, v, valid)
    with pytest.raises(ValueError, match="CUDA device"):
        bidirectional(attention, q, k, v)
    with pytest.raises(ValueError, match="no Triton kernel"):
        bidirectional(layer("augmented:flash", impl="triton", causal=False), q, k, v)


@pytest.mark.parametrize("dropped", ["far", "local"])
def test_ablated_parts_leave_the_normaliser(dropped):
    attention = layer("augmented")
    attention.dropped = dropped
    q, k, v = tokens(40)
    torch.testing.assert_close(chunked(attention, None, q, k, v)[0], by_block(attention, None, q, k, v)[0])
    attention = layer("augmented", causal=False)
    attention.dropped = dropped
    torch.testing.assert_close(bidirectional(attention, q, k, v), encode_by_block(attention, q, k, v))


def test_bfloat16_is_summed_in_fp32():
    attention = layer("augmented").float()
    q, k, v = (x.detach() for x in tokens(200))
    exact = by_block(attention.double(), None, q, k, v)[0]
    out, state = chunked(attention.float(), None, *(x.bfloat16() for x in (q, k, v)))
    assert (out.dtype, state.S.dtype, state.recent_k.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert (out - exact).norm() / exact.norm() < 1e-2


def test_what_cannot_run_in_triton_is_refused_when_forced():
    q, k, v = (x.detach() for x in tokens(20))
    with pytest.raises(ValueError, match="CUDA device"):
        chunked(layer("augmented", impl="triton"), None, q, k, v)
    with pytest.raises(ValueError, match="CUDA device"):
        chunked(layer("augmented:flash", impl="triton"), None, q, k, v)
    with pytest.raises(ValueError, match="no Triton kernel"):
        chunked(layer("retention", impl="triton"), None, q, k, v)
    with pytest.raises(ValueError, match="auto, torch, triton"):
        chunked(layer("augmented", impl="cuda"), None, q, k, v)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, causal", [("augmented", True), ("augmented", False), ("augmented:flash", True)]
)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_errors_do_not_grow_with_the_context(name, causal, dtype, bound):
    """Against fp64, over keys with a mean, whose sum grows with the context."""
    attention = layer(name, heads=1, kv_heads=1, size=64, width=32, causal=causal)
    run = (
        (lambda *inputs: chunked(attention, None, *inputs)[0])
        if causal
        else partial(bidirectional, attention)
    )
    found = []
    for length in (2048, 65536):
        q, k, v = (x.detach().to(dtype) for x in tokens(length, heads=1, kv_heads=1, batch=1))
        attention.double()
        exact = run(q.double(), k.double(), v.double())
        attention.float()
        error = run(q, k, v) - exact
        found.append((error.norm() / exact.norm()).item())
    assert max(found) < bound and found[1] < 1.2 * found[0]
