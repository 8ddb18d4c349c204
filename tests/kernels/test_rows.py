"""Rows of different lengths: outputs, states and gradients are those of the reference `block`."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linearize_kernels import bidirectional, chunked
from linearize_kernels.ops.bidirectional import by_block
from linearize_kernels.ops.chunked import run_segment
from linearize_kernels.ops.rows import rows_alike
from odd_layer import layer, tokens

ROWS = 3


def reference(attention, state, q, k, v, valid):
    state = state or attention.empty_state(len(q), q.device, k.dtype)
    return run_segment(attention, state, None, q, k, v, valid, None, 7, in_step=False)


def spans(begin, end, length):
    """`[B, T]`, True from `begin` to `end` of each row."""
    place = torch.arange(length)
    return (place >= torch.tensor(begin)[:, None]) & (place < torch.tensor(end)[:, None])


def compare(found, expected, wanted, valid):
    """Compare outputs at tokens, and their gradients."""
    if not found.requires_grad:  # there are pads alone
        return
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    towards = towards * valid[:, None, :, None]
    options = dict(retain_graph=True, materialize_grads=True, allow_unused=True)
    results = [
        [out * valid[:, None, :, None], *torch.autograd.grad(out, wanted, towards, **options)]
        for out in (found, expected)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def compare_states(found, expected):
    """Compare two states. What empty places hold does not matter."""
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.recent_position, expected.recent_position)
    there = (found.recent_position >= 0)[:, None, :, None]
    sinks = (torch.arange(found.sink_k.shape[-2]) < found.count[:, None])[:, None, :, None]
    for name, seen in dict(S=1, z=1, recent_k=there, recent_v=there, sink_k=sinks, sink_v=sinks).items():
        pair = (getattr(x, name) * seen for x in (found, expected))
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["augmented", "augmented:flash", "window"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_two_turns_of_rows_with_pads(method, data):
    attention = layer(method)
    state = other = None
    for length in data.draw(st.lists(st.integers(8, 40), min_size=2, max_size=2), label="lengths"):
        cuts = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted)
        begin, end = zip(*(data.draw(cuts) for _ in range(ROWS)), strict=True)
        valid, heads = spans(begin, end, length), tokens(length)
        groups = rows_alike(attention, state, valid, heads[0], False)
        assert sorted(row for group in groups for row in group.rows) == list(range(ROWS))
        out, state = chunked(attention, state, *heads, valid)
        expected, other = reference(attention, other, *heads, valid)
        compare(out, expected, [*heads, *attention.parameters()], valid)
        compare_states(state, other)
        state, other = (x.map(torch.Tensor.detach) for x in (state, other))


def test_rows_that_have_had_different_numbers_of_tokens():
    attention = layer("augmented")
    _, state = chunked(attention, None, *tokens(20), spans((0, 13, 5), (20, 20, 20), 20))
    state, heads = state.map(torch.Tensor.detach), tokens(30)
    out, after = chunked(attention, state, *heads)
    assert attention.ran == "torch"
    expected, other = reference(attention, state, *heads, None)
    compare(out, expected, heads, torch.ones(ROWS, 30, dtype=torch.bool))
    compare_states(after, other)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ends=st.lists(st.integers(0, 33), min_size=ROWS, max_size=ROWS), left=st.booleans())
def test_encoders(ends, left):
    attention, heads = layer("augmented", causal=False), tokens(33)
    valid = spans([33 - end for end in ends] if left else (0,) * ROWS, (33,) * ROWS if left else ends, 33)
    out = bidirectional(attention, *heads, valid)
    compare(out, by_block(attention, *heads, valid), [*heads, *attention.parameters()], valid)


@pytest.mark.parametrize("pad", [0, 3])
def test_pads_between_tokens_and_other_equations_are_left_to_block(pad):
    q, k, v = tokens(20)
    valid = torch.ones(ROWS, 20, dtype=torch.bool)
    valid[1, pad : pad + 2] = False
    assert (rows_alike(layer("augmented"), None, valid, q, False) is None) == (pad > 0)
    assert rows_alike(layer("augmented"), None, valid, q, True) is None
    assert rows_alike(layer("gated-delta"), None, valid, q, False) is None
