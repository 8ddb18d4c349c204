"""`block`, `chunked` and decoding against `step` and a dense O(T²) reference, in fp64."""

import dense
import pytest
import torch
from equation_case import BASE, FORMS, FORWARD_ONLY, branches, chain, close, make, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linearize_kernels import (
    bidirectional,
    block,
    chunked,
    commit,
    cross,
    encode,
    step,
)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [1, 3, 8, 23])
def test_step_and_chunked_equal_the_dense_reference(name, length):
    attention = make(name)
    q, k, v = tokens(2, length)
    expected = dense.attention(attention, q, k, v)
    close(torch.stack([chain(attention, q[b], k[b], v[b])[0] for b in range(2)]), expected)
    for chunk in (1, 4, 7, 64):
        close(chunked(attention, None, q, k, v, chunk=chunk)[0], expected)


@pytest.mark.parametrize("name", FORMS)
def test_a_learned_sink_logit_joins_the_softmax(name):
    attention = make(name)
    if attention.equation.score != "softmax" or attention.equation.size == 0:
        pytest.skip("a sink logit is a term of the local softmax, which this form does not have")
    q, k, v = tokens(1, 13)
    logits = torch.randn(BASE["heads"], dtype=torch.float64)
    expected = dense.attention(attention, q, k, v, sink_logits=logits)
    close(chain(attention, q[0], k[0], v[0], logits)[0][None], expected)
    close(chunked(attention, None, q, k, v, sink_logits=logits, chunk=4)[0], expected)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_tree_equals_its_paths(name, data):
    """Random trees after random prefixes: every node as if its path had been decoded token by token."""
    attention = make(name, data.draw(st.integers(0, 99)))
    prefix, nodes = data.draw(st.integers(0, 17)), data.draw(st.integers(1, 14))
    parents = [data.draw(st.integers(max(-1, i - 4), i - 1)) for i in range(nodes)]
    q, k, v = tokens(1, prefix + nodes)
    state = attention.empty_state(1, "cpu", torch.float64)
    if prefix:
        _, state = chunked(attention, None, q[..., :prefix, :], k[..., :prefix, :], v[..., :prefix, :])
    visible = torch.eye(nodes, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            visible[i] |= visible[parent]
    position = prefix + visible.sum(-1)[None] - 1
    before = state.fork()
    out = block(attention, state, *(x[..., prefix:, :] for x in (q, k, v)), position, visible)
    chained = [*range(-1, prefix - 1), *(prefix + parent for parent in parents)]
    expected, states = branches(attention, q[0], k[0], v[0], chained)
    close(out[0], expected[:, prefix:])
    assert all(torch.equal(getattr(state, f), getattr(before, f)) for f in vars(before))
    accepted = [j for j in range(nodes) if visible[-1, j]]
    after = commit(attention, state, *(x[..., prefix:, :][..., accepted, :] for x in (k, v)))
    more, last = tokens(1, 3), states[-1]
    for t in range(3):
        out, after = chunked(attention, after, *(x[..., t : t + 1, :] for x in more))
        expected, last = step(attention, last, *(x[0, :, t] for x in more))
        close(out[0, :, 0], expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lengths", [(0, 3, 17), (5, 6, 1), (9, 4, 12)])
def test_one_tree_on_rows_of_different_lengths(name, lengths):
    """Each row of the batch is at a position of its own, in its own group and window."""
    attention, prefix = make(name), max(lengths)
    parents = [-1, 0, 0, 1, 3, 4, 4, 2]
    nodes = len(parents)
    q, k, v = tokens(len(lengths), prefix + nodes)
    valid = torch.arange(prefix) >= prefix - torch.tensor(lengths)[:, None]
    before, tree = slice(0, prefix), slice(prefix, None)
    _, state = chunked(attention, None, *(x[..., before, :] for x in (q, k, v)), valid)
    visible = torch.eye(nodes, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            visible[i] |= visible[parent]
    position = torch.tensor(lengths)[:, None] + visible.sum(-1) - 1
    out = block(attention, state, *(x[..., tree, :] for x in (q, k, v)), position, visible)
    for row, length in enumerate(lengths):
        own = [x[row, :, prefix - length :] for x in (q, k, v)]
        chained = [*range(-1, length - 1), *(length + parent for parent in parents)]
        expected, _ = branches(attention, *own, chained)
        close(out[row], expected[:, length:])


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_pads_and_cuts_change_nothing(name, data):
    """Rows with pads anywhere, fed in random pieces, equal each row alone in one piece."""
    attention = make(name)
    length, rows = data.draw(st.integers(1, 24)), 3
    valid = torch.tensor([[data.draw(st.booleans()) for _ in range(length)] for _ in range(rows)])
    q, k, v = tokens(rows, length)
    state, first, outputs = None, 0, []
    while first < length:
        part = slice(first, first + data.draw(st.integers(1, 9)))
        chunk = data.draw(st.sampled_from([1, 3, 8]))
        out, state = chunked(
            attention, state, q[..., part, :], k[..., part, :], v[..., part, :], valid[:, part], chunk=chunk
        )
        outputs.append(out)
        first = part.stop
    out = torch.cat(outputs, -2)
    for row in range(rows):
        own = valid[row]
        assert int(state.count[row]) == int(own.sum())
        if own.any():
            expected, last = chain(attention, q[row][:, own], k[row][:, own], v[row][:, own])
            close(out[row][:, own], expected)
            if attention.equation.scope == "sliding" and attention.equation.recent == attention.equation.size:
                close(state.S[row], last.S)
                close(state.z[row], last.z)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", FORMS)
def test_gradients_equal_the_dense_reference(name):
    attention = make(name)
    q, k, v = (x.requires_grad_() for x in tokens(1, 19))
    weight = torch.randn(1, BASE["heads"], 19, BASE["value_dim"], dtype=torch.float64)
    inputs = [q, k, v, *attention.parameters()]

    def gradients(out):
        return torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)

    expected = gradients(dense.attention(attention, q, k, v))
    got = gradients(chunked(attention, None, q, k, v, chunk=5)[0])
    if (
        attention.equation.feature_map == "yoso"
    ):  # the dense hash has no gradient of its own: q and k have others
        got, expected = (x[2:] for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_the_state_has_one_size(name="augmented"):
    attention = make(name)
    sizes = set()
    for length in (1, 10, 100, 1000):
        sizes.add(chunked(attention, None, *tokens(1, length))[1].nbytes())
    assert len(sizes) == 1


@pytest.mark.parametrize("name", FORMS)
def test_segments_carry_the_state(name):
    attention = make(name)
    q, k, v = tokens(2, 50)
    whole, state = chunked(attention, None, q, k, v)
    out, end = chunked(attention, None, q, k, v, segment=16)
    close(out, whole)
    close(end.S, state.S)


@pytest.mark.parametrize("dropped", ["local", "far"])
def test_a_dropped_part_leaves_the_normaliser_too(dropped):
    attention = make("augmented")
    q, k, v = tokens(1, 17)
    attention.dropped = dropped
    close(chunked(attention, None, q, k, v, chunk=4)[0], dense.attention(attention, q, k, v, dropped=dropped))


BOTH_WAYS = [name for name in FORMS if name not in FORWARD_ONLY]


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("length", [1, 4, 23, 50])
def test_bidirectional_equals_the_dense_reference(name, length):
    attention = make(name, causal=False)
    q, k, v = tokens(2, length)
    expected = dense.attention(attention, q, k, v)
    for chunk in (1, 8, None):
        close(bidirectional(attention, q, k, v, chunk=chunk), expected)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional_leaves_pads_out(name):
    attention = make(name, causal=False)
    q, k, v = tokens(4, 41)
    valid = torch.rand(4, 41) < torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None]
    valid[0, 7] = True
    out = bidirectional(attention, q, k, v, valid, chunk=8)
    assert out.isfinite().all()
    for row, own in enumerate(valid):
        alone = (x[row : row + 1][:, :, own] for x in (q, k, v))
        close(out[row : row + 1][:, :, own], dense.attention(attention, *alone))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional_gradients_equal_the_dense_reference(name):
    attention = make(name, causal=False)
    q, k, v = (x.requires_grad_() for x in tokens(1, 19))
    weight = torch.randn(1, BASE["heads"], 19, BASE["value_dim"], dtype=torch.float64)
    inputs = [v, *attention.parameters()] + ([] if "yoso" in name else [q, k])

    def gradients(out):
        return torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)

    expected = gradients(dense.attention(attention, q, k, v))
    for a, b in zip(gradients(bidirectional(attention, q, k, v, chunk=6)), expected, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


@pytest.mark.parametrize("name", ["linear", "relu", "linformer"])
def test_cross_attention_is_the_normalised_far_part_over_all_tokens(name):
    attention = make(name, causal=False)
    q, _, _ = tokens(2, 7)
    _, k, v = tokens(2, 11)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, 6:] = False
    out = cross(attention, q, *encode(attention, k, v, valid))
    every = torch.ones(7, 11, dtype=torch.bool)
    for row, length in enumerate((11, 6)):
        for head in range(BASE["heads"]):
            own = head // (BASE["heads"] // BASE["kv_heads"])
            keys, values = k[row, own, :length], v[row, own, :length]
            far, mass = dense.far_part(attention, head, q[row, head], keys, values, every[:, :length])
            close(out[row, head], far / mass[:, None])
