"""`auto` tries Triton's kernels before it uses them, and computes in torch where they fail. Functions that fail in the
ways of kernels stand for them.
"""

import warnings

import pytest
import torch
from linearize_kernels.ops import backend, trial
from linearize_kernels.ops.chunked import chunked
from linearize_kernels.torch_forms.sliding import sliding
from linearize_kernels.triton import nodes, tuning
from triton_case import LAYERS, layer

from linearize_cli.runtime.cache import LinearCacheLayer

FORM = ("sliding", "softmax", "shared")


class FailsInTheBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of resource: shared memory\nRequired: 1")


def fails(*arguments):
    raise OSError("no C compiler found")


def fails_in_the_backward(*arguments):
    out, S, z = sliding(*arguments)
    return FailsInTheBackward.apply(out), S, z


@pytest.fixture
def kernels(monkeypatch):
    """kernels(function): on this machine, Triton's sliding form is `function`, and there is no fused prefill."""
    monkeypatch.setattr(backend, "can_fuse", lambda *arguments: False)
    monkeypatch.setattr(backend, "wants_triton", lambda attention, q: attention.impl != "torch")
    monkeypatch.setattr(backend, "why_not_prefill", lambda *arguments: None)
    monkeypatch.setattr(trial, "_said", set())

    def use(function):
        monkeypatch.setitem(backend.FORMS, FORM, backend.FORMS[FORM]._replace(triton=function))

    return use


def attended(attention, heads):
    return chunked(attention, None, *heads)[0]


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return [torch.randn(2, count, 50, 16) for count in (2, 1, 1)]


def test_kernels_that_run_are_used(kernels, heads):
    kernels(sliding)
    attention = layer(**LAYERS["sliding"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attended(attention, heads)
    assert attention.ran == "triton"


def test_kernels_that_do_not_run_are_replaced_with_one_warning(kernels, heads):
    kernels(fails)
    layers = [layer(**LAYERS["sliding"]) for _ in range(3)]
    with pytest.warns(UserWarning) as said:
        found = [attended(attention, heads) for attention in layers for _ in range(2)]
    assert [str(x.message) for x in said] == [
        "Triton's kernels for prefill and training do not run on cpu, so torch computes instead, which is slower: "
        "OSError: no C compiler found"
    ]
    assert all(attention.ran == "torch" for attention in layers)
    layers[0].impl = "torch"
    assert torch.equal(found[0], attended(layers[0], heads))


def test_the_backward_is_tried_for_training_alone(kernels, heads):
    kernels(fails_in_the_backward)
    attention = layer(**LAYERS["sliding"])
    with torch.no_grad():
        attended(attention, heads)
    assert attention.ran == "triton"
    with pytest.warns(UserWarning, match="out of resource: shared memory$"):
        attended(attention, heads).sum().backward()
    assert attention.ran == "torch" and attention.conv.grad is not None


def test_fused_prefill_is_tried_too(kernels, heads, monkeypatch):
    kernels(sliding)
    monkeypatch.setattr(backend, "can_fuse", lambda *arguments: not torch.is_grad_enabled())
    monkeypatch.setitem(backend.FORMS, FORM, backend.FORMS[FORM]._replace(fused=fails))
    attention = layer(**LAYERS["sliding"])
    with torch.no_grad(), pytest.warns(UserWarning, match="no C compiler found$"):
        attended(attention, heads)
    assert attention.ran == "torch"
    attended(attention, heads)  # with gradients, the other kernels run
    assert attention.ran == "triton"


def test_triton_by_name_raises_the_error_itself(kernels, heads):
    kernels(fails)
    attention = layer(**LAYERS["sliding"])
    attention.impl = "triton"
    with pytest.raises(OSError, match="no C compiler"):
        attended(attention, heads)


def test_a_trial_leaves_no_trace(kernels, heads):
    kernels(fails)
    attention = layer(**LAYERS["sliding"])
    attention.ran, seed = "block", torch.get_rng_state()
    with pytest.warns(UserWarning):
        plan = backend.prefill(attention, tuple(heads), 0)
    assert plan.name == "torch" and attention.ran == "block" and torch.equal(seed, torch.get_rng_state())
    assert all(x.grad is None for x in attention.parameters())


@torch.no_grad()
def test_decoding_too(monkeypatch, heads):
    monkeypatch.setattr(trial, "_said", set())
    monkeypatch.setattr(nodes, "why_not", lambda *arguments: None)
    monkeypatch.setattr(nodes, "decode_one_token", fails)
    attention = layer(**LAYERS["sliding"])
    with pytest.warns(UserWarning, match="for decoding do not run"):
        assert "no C compiler" in nodes.trial(attention, heads[0])
    attention.impl = "triton"
    assert nodes.trial(attention, heads[0]) is None

    monkeypatch.setattr("linearize_cli.runtime.cache.decoding_backend", lambda *arguments: "triton")
    monkeypatch.setattr("linearize_cli.runtime.cache.why_not", lambda *arguments: None)
    cache = LinearCacheLayer()
    cache.state = attention.empty_state(2, "cpu", torch.float32)
    assert cache.state_to_write(attention, heads[0], None) is not None
    attention.impl = "auto"
    assert cache.state_to_write(attention, heads[0], None) is None


def test_an_old_triton_is_refused(monkeypatch, heads):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", True)
    assert tuning.limit(*heads) is None
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert tuning.limit(*heads) == "Triton 3.2.0 is too old: 3.3 or newer compiles the kernels"
