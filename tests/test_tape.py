"""Calls that are played again: they do what the function does that made them, on whatever is in its tensors then."""

import gc

import pytest
import torch
from linearize_kernels import LinearAttention, bidirectional, chunked
from linearize_kernels.ops.bidirectional import by_block as encode_by_block
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap
from linearize_kernels.torch_forms.scratch import REMEMBERED, SCRATCH
from linearize_kernels.torch_forms.sliding_room import TAPES, Room
from linearize_kernels.torch_forms.tape import Tape
from test_blocked import by_block, layer
from torch.utils.flop_counter import FlopCounterMode

from linearize_cli.methods import load_recipe


def some_of_everything(x, y, place):
    """Views, in place, to a place, anew with and without a function of torch that writes, bools and integers."""
    part = x[..., 1:].mT
    place.zero_()
    place[0] = x.sum()
    place[1:3] += y[:2].sum(-1)
    below = part @ y[:, 1:] < y.new_tensor(0.5)
    below &= part.sum(1, keepdim=True) > 2.0
    counted = below.sum(0, keepdim=True) + torch.arange(below.shape[-1])
    flipped = (1 - y).flip(0).masked_fill(y > 0.7, -1.0).clone()
    torch.mul(flipped, 3, out=flipped)
    first, second = flipped.unbind(-1)[:2]
    return torch.cat([first, second]).cumsum(0), counted.log(), torch.zeros_like(place) + place, below


def test_played_is_run():
    generator = torch.Generator().manual_seed(0)
    x, y, place = (torch.empty(*size) for size in ((5, 4), (5, 4), (4,)))

    def fill():
        for tensor in (x, y):
            tensor.copy_(torch.rand(tensor.shape, generator=generator))

    fill()
    tape = Tape(lambda: some_of_everything(x, y, place))
    for _ in range(3):
        fill()
        expected = some_of_everything(x, y, place)
        place.fill_(float("nan"))
        for pair in zip(tape.play(), expected, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_it_takes_calls_that_make_one_tensor():
    with pytest.raises(TypeError, match="makes several tensors"):
        Tape(lambda: torch.rand(3).max(0))


@pytest.mark.parametrize("read", [float, int, bool, torch.Tensor.item, torch.Tensor.tolist])
def test_it_depends_on_no_number(read):
    with pytest.raises(TypeError, match="must not depend on one"):
        Tape(lambda: read(torch.ones(3).sum()))


@pytest.fixture()
def played(monkeypatch):
    """How often tapes were played; one head after the other, so that there are pieces alike."""
    count = []
    play = Tape.play
    monkeypatch.setattr(Tape, "play", lambda tape: count.append(tape) or play(tape))
    monkeypatch.setattr("linearize_kernels.torch_forms.tiles.CACHED", 1 << 9)
    SCRATCH.made.clear()
    return count


def texts(lengths, heads=4, kv_heads=2, dtype=torch.float64):
    """q, k, v of a few lengths, with means, and gradients of the outputs."""
    generator = torch.Generator().manual_seed(sum(lengths))
    for length in lengths:
        sizes = [
            (2, heads, length, 8),
            (2, kv_heads, length, 8),
            (2, kv_heads, length, 7),
            (2, heads, length, 7),
        ]
        yield [(torch.randn(*x, generator=generator) + 0.3).to(dtype) for x in sizes]


def everything(attention, q, k, v, d_out, run):
    """Outputs, states and all gradients of a text in two calls; run: of the first and the second part."""
    inputs, learned = [x.clone().requires_grad_() for x in (q, k, v)], list(attention.parameters())
    learned = [x for x in learned if x.requires_grad]
    outputs, ends = run(attention, *inputs)
    grads = torch.autograd.grad(
        [outputs, *(x for x in ends if x.requires_grad)],
        [*inputs, *learned],
        [d_out, *(torch.ones_like(x) for x in ends if x.requires_grad)],
        allow_unused=True,
        materialize_grads=True,
    )
    return [outputs.detach(), *ends, *grads]


def in_two(attention, q, k, v):
    cut = q.shape[-2] // 3
    first, state = chunked(attention, None, *(x[..., :cut, :] for x in (q, k, v)))
    second, state = chunked(attention, state, *(x[..., cut:, :] for x in (q, k, v)))
    return torch.cat([first, second], -2), (state.S, state.z)


def encoded(attention, q, k, v):
    return bidirectional(attention, q, k, v), ()


def by_block_alone(attention, q, k, v):
    out, state = by_block(attention, None, q, k, v)
    return out, (state.S, state.z)


def encoded_by_block(attention, q, k, v):
    return encode_by_block(attention, q, k, v), ()


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", ["augmented", "augmented:relu", "window"])
def test_pieces_that_are_played_are_those_of_block(name, kv_heads, causal, frozen, played):
    """Two layers in turns, which share their rooms; one has parameters that do not learn. Lengths come again."""
    layers: list[LinearAttention] = [layer(name, kv_heads=kv_heads, causal=causal) for _ in range(2)]
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.mul_(1.2).add_(0.1)
    for parameter in list(layers[1].parameters())[frozen::2]:
        parameter.requires_grad_(False)
    run, found, expected = in_two if causal else encoded, [], []
    every = [(own, text) for text in texts((70, 33, 70, 101, 70), kv_heads=kv_heads) for own in layers]
    for own, text in every:
        found += everything(own, *text, run)
        with torch.no_grad():
            found.append(run(own, *text[:3])[0])
        for block, _ in SCRATCH.blocks.values():  # nothing that was returned lies there, nor is it read again
            block.copy_(torch.full_like(block, float("nan")) if block.is_floating_point() else 1)
    assert played
    for own, text in every:
        results = everything(own, *text, by_block_alone if causal else encoded_by_block)
        expected += [*results, results[0]]
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_where_torch_functions_are_not_seen_nothing_is_noted(played):
    attention, every = layer("augmented"), list(texts((70, 70, 70)))
    with torch.no_grad():
        with torch._C.DisableTorchFunction():
            found = [in_two(attention, *text[:3])[0] for text in every]
        assert not played
        found += [in_two(attention, *text[:3])[0] for text in every]
        for out, text in zip(found, every * 2, strict=True):
            torch.testing.assert_close(out, by_block(attention, None, *text[:3])[0], rtol=1e-9, atol=1e-9)


def test_a_far_part_without_its_weights_of_keys(played):
    attention, every = layer("augmented"), list(texts((70, 70, 70)))
    attention.far.key_weight = None
    with torch.no_grad():
        for text in every:
            expected = by_block(attention, None, *text[:3])[0]
            torch.testing.assert_close(in_two(attention, *text[:3])[0], expected, rtol=1e-9, atol=1e-9)


class Squares(FeatureMap):
    """Writes to the memory that it is given."""

    positive, per_head = True, ()

    def forward(self, x):
        return x.square()

    def between(self, x, heads, before, ahead, weight, out=None):
        phi = super().between(x, heads, before, ahead, weight)
        return phi if out is None else out.copy_(phi)


def test_a_map_is_given_memory_like_its_features(played, monkeypatch):
    monkeypatch.setitem(FEATURE_MAPS, "squares", Squares)
    changes = dict(far=load_recipe("augmented").to_dict()["attention"]["far"] | {"feature_map": "squares"})
    attention = layer("augmented", **changes)
    with torch.no_grad():
        for text in texts((70, 33, 70)):
            expected = by_block(attention, None, *text[:3])[0]
            torch.testing.assert_close(in_two(attention, *text[:3])[0], expected, rtol=1e-9, atol=1e-9)


def test_every_run_counts_the_same_flops(played):
    attention, (text,) = layer("augmented"), texts((70,))
    counted = set()
    for _ in range(5):
        with FlopCounterMode(display=False) as flops:
            everything(attention, *text, in_two)
        counted.add(flops.get_total_flops())
    assert played and len(counted) == 1, counted


def test_few_are_kept_and_all_in_the_same_memory(played):
    attention = layer("augmented")
    with torch.no_grad():
        for text in texts(range(20, 150)):
            in_two(attention, *text[:3])
    assert len(SCRATCH.made) <= REMEMBERED
    rooms = [room for room in SCRATCH.made.values() if isinstance(room, Room)]
    blocks = {block.untyped_storage().data_ptr() for block, _ in SCRATCH.blocks.values()}
    for room in rooms:
        assert len(room.tapes) <= TAPES
        for tape in filter(None, room.tapes.values()):
            results = [x for call in tape.calls for x in getattr(call, "keywords", {}).values()]
            places = [x for x in results if isinstance(x, torch.Tensor)]
            assert {x.untyped_storage().data_ptr() for x in places} <= blocks
    assert any(tape for room in rooms for tape in room.tapes.values())


def test_a_graph_holds_no_room(played):
    own = layer("augmented", causal=False)
    out = [bidirectional(own, *(x.requires_grad_() for x in text[:3])) for text in texts((70, 33, 70))]
    SCRATCH.made.clear()
    assert not [x for x in gc.get_objects() if type(x) is Room], out
