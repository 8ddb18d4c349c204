"""`Decoding`: one token after the other in a ring buffer, against `step`, `chunked` and `block`."""

import pytest
import torch
from equation_case import BASE, FORMS, chain, close, make, tokens
from linearize_kernels import block, chunked
from linearize_kernels.ops.decode import Decoding
from torch import nn

PADS = [0, 2, 5]  # on the left of each row


def decode(attention, decoding, q, k, v, sink_logits=None) -> torch.Tensor:
    """Return the outputs of tokens that are decoded one after the other."""
    tokens = zip(*(x.split(1, -2) for x in (q, k, v)), strict=True)
    return torch.cat([decoding.decode_one_token(attention, *token, sink_logits) for token in tokens], -2)


def same(state, expected) -> None:
    """Check that states are equal, whatever their empty slots hold."""
    there = (expected.recent_position >= 0)[:, None, :, None]
    for name, own in vars(expected).items():
        found = getattr(state, name)
        close(*(x * there if name in ("recent_k", "recent_v") else x for x in (found, own)))


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_tokens_one_by_one_equal_step(name):
    """From the first token on, several times around the ring."""
    attention = make(name)
    q, k, v = tokens(1, 3 * attention.equation.recent + 8)
    decoding = Decoding(attention.equation, attention.empty_state(1, "cpu", torch.float64))
    close(decode(attention, decoding, q, k, v)[0], chain(attention, q[0], k[0], v[0])[0])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("prefix", [6, 11, 20])
@torch.no_grad()
def test_rows_of_different_lengths(name, prefix):
    """Rows behind pads, whose ring begins with empty slots; and the state that is left."""
    attention = make(name)
    length = prefix + 2 * attention.equation.recent + 3
    q, k, v = tokens(len(PADS), length)
    valid = torch.arange(length) >= torch.tensor(PADS)[:, None]
    expected, end = chunked(attention, None, q, k, v, valid)
    begun = [x[..., :prefix, :] for x in (q, k, v)]
    decoding = Decoding(attention.equation, chunked(attention, None, *begun, valid[:, :prefix])[1])
    found = decode(attention, decoding, *(x[..., prefix:, :] for x in (q, k, v)))
    close(found, expected[..., prefix:, :])
    same(decoding.state(), end)


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_tree_from_every_slot_of_the_ring(name):
    attention = make(name)
    steps = attention.equation.recent + 2
    q, k, v = tokens(1, steps + 3)
    decoding = Decoding(attention.equation, attention.empty_state(1, "cpu", torch.float64))
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    nodes = [x[..., steps:, :] for x in (q, k, v)]
    for t in range(steps):
        decode(attention, decoding, *(x[..., t : t + 1, :] for x in (q, k, v)))
        path = [
            torch.cat([x[..., : t + 1, :], y[..., [0, 2], :]], -2)
            for x, y in zip((q, k, v), nodes, strict=True)
        ]
        position = t + 1 + torch.tensor([[0, 1, 1]])
        found = block(attention, decoding.state(), *nodes, position, ancestors)
        close(found[..., [0, 2], :], chunked(attention, None, *path)[0][..., -2:, :])


@torch.no_grad()
def test_sink_logits_dropped_parts_and_half_precision():
    q, k, v = tokens(2, 30)
    for dropped in (None, "local", "far"):
        attention = make("augmented")
        attention.dropped = dropped
        logits = torch.randn(BASE["heads"], dtype=torch.float64)
        expected = chunked(attention, None, q, k, v, sink_logits=logits)[0]
        decoding = Decoding(attention.equation, attention.empty_state(2, "cpu", torch.float64))
        close(decode(attention, decoding, q, k, v, logits), expected)
    narrow = [x.bfloat16() for x in (q, k, v)]
    attention = make("augmented").float()
    decoding = Decoding(attention.equation, attention.empty_state(2, "cpu", torch.bfloat16))
    found = decode(attention, decoding, *narrow)
    torch.testing.assert_close(
        found, chunked(attention, None, *(x.float() for x in narrow))[0], atol=1e-5, rtol=0.0
    )
    assert decoding.state().recent_k.dtype == torch.bfloat16


@torch.no_grad()
def test_no_memory_is_shared():
    attention = make("augmented")
    q, k, v = tokens(2, 40)
    state = chunked(attention, None, *(x[..., :20, :] for x in (q, k, v)))[1]
    before = state.fork()
    one, other = Decoding(attention.equation, state), Decoding(attention.equation, state)
    first = decode(attention, one, *(x[..., 20:, :] for x in (q, k, v)))
    same(state, before)
    left = one.state()
    kept = left.fork()
    decode(attention, one, *(x[..., :9, :] for x in (q, k, v)))
    same(left, kept)
    close(decode(attention, other, *(x[..., 20:, :] for x in (q, k, v))), first)


@pytest.mark.parametrize("change", ["in place", "replaced", "moved"])
@torch.no_grad()
def test_parameters_may_change_between_tokens(change):
    attention = make("augmented")
    q, k, v = tokens(1, 30)
    state = chunked(attention, None, *(x[..., :20, :] for x in (q, k, v)))[1]
    token = [x[..., 20:21, :] for x in (q, k, v)]
    decode(attention, Decoding(attention.equation, state), *token)
    for part in attention.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if change == "in place":
                parameter.mul_(1.1)
            elif change == "replaced":
                setattr(part, name, nn.Parameter(parameter * 1.1))
            else:
                parameter.data = parameter * 1.1
    expected = chunked(attention, state, *token)[0]
    close(decode(attention, Decoding(attention.equation, state), *token), expected)
