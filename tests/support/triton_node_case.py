"""Trees, paths and decoding steps in Triton, against `block`, `commit` and `chunked` in fp64."""

import copy
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_case import relative

NODE_SLIDING = dict(
    size=6, feature_map="hedgehog", feature_dim=8, key_weight=True, combine="shared", conv_width=4, sinks=2
)
NODE_GROUP = dict(scope="group", size=6, score="relu2", feature_map="identity", combine="none", conv_width=4)
# `counts`: tokens in each row before. `steps`: decoded tokens. `nodes`: nodes of each tree.
NODE_CASES = {
    "sliding": dict(parts=NODE_SLIDING, counts=(0, 5), steps=15),
    "group": dict(parts=NODE_GROUP, counts=(0, 9), steps=15),
    "queries in groups": dict(parts=NODE_SLIDING, heads=4, kv_heads=2, counts=(3, 8)),
    "groups of queries, in groups": dict(
        parts=NODE_GROUP | dict(feature_map="relu"), heads=4, kv_heads=2, counts=(5, 1)
    ),
    "features of each query head": dict(
        parts=NODE_SLIDING | dict(per_query_head=True), heads=4, kv_heads=2, counts=(7,)
    ),
    "conv beyond the window": dict(parts=NODE_SLIDING | dict(conv_width=11), counts=(1, 12), steps=9),
    "conv beyond the group": dict(parts=NODE_GROUP | dict(conv_width=11), counts=(2, 12), steps=9),
    "sinks still recent": dict(parts=NODE_SLIDING | dict(sinks=5), counts=(1, 4, 9), steps=3),
    "another map, no weights": dict(
        parts=NODE_SLIDING | dict(feature_map="elu", key_weight=False), counts=(4, 20)
    ),
    "no far part, no conv": dict(parts=dict(size=6, combine="shared", sinks=1), counts=(0, 8)),
    "odd widths, slices": dict(
        parts=NODE_SLIDING | dict(feature_dim=20), key_dim=24, value_dim=40, counts=(9, 2), steps=4
    ),
    "wide heads": dict(parts=NODE_SLIDING | dict(feature_dim=40), key_dim=72, counts=(13,), steps=2),
    "paths at the start": dict(parts=NODE_SLIDING, counts=(6, 0, 0), steps=0),
    "nothing far yet": dict(parts=NODE_SLIDING, mix=200, counts=(0,), steps=9),
    "tiles of slots": dict(parts=NODE_SLIDING | dict(size=70), counts=(68, 90), nodes=40, steps=3),
    "more rows than a tile": dict(
        parts=NODE_SLIDING | dict(size=20), heads=4, counts=(21,), nodes=19, steps=1
    ),
    "bfloat16": dict(parts=NODE_SLIDING, heads=2, counts=(3, 30), dtype=torch.bfloat16),
    "bfloat16 in groups": dict(parts=NODE_GROUP, heads=2, counts=(3, 30), dtype=torch.bfloat16),
}


def node_layer(parts, heads=1, kv_heads=1, key_dim=16, value_dim=16, mix=0):
    """Make a layer in fp64, all of whose parameters affect the output.

    `mix` is added to the logarithm of the far part's factor.
    """
    from linearize_kernels import Equation, LinearAttention

    torch.manual_seed(0)
    geometry = dict(heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, scale=key_dim**-0.5)
    attention = LinearAttention(Equation(**geometry, **parts)).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
        if mix:
            attention.combine.mix[:, -1] += mix
    return attention


def draw_tokens(attention, batch, length, dtype):
    """Draw q, k and v in fp64, with values that `dtype` can represent.

    Keys and values have a common mean.
    """
    eq = attention.equation
    shapes = ((eq.heads, eq.key_dim), (eq.kv_heads, eq.key_dim), (eq.kv_heads, eq.value_dim))
    drawn = [torch.randn(batch, heads, length, width) + 0.5 for heads, width in shapes]
    return [x.to(dtype).double() for x in drawn]


def random_tree(nodes):
    """Draw a random tree and return `visible [T, T]`. Half of the nodes follow the node before them."""
    visible = torch.eye(nodes, dtype=torch.bool)
    for i in range(1, nodes):
        parent = i - 1 if torch.rand(()) < 0.5 else int(torch.randint(-1, i, ()))
        if parent >= 0:
            visible[i] |= visible[parent]
    return visible


def state_errors(state, expected):
    """Compute the relative errors of S and z.

    They are infinite if any tensor that is only copied differs at all.
    """
    present = expected.recent_position >= 0
    moved = [(state.count, expected.count), (state.recent_position, expected.recent_position)]
    moved += [(state.sink_k, expected.sink_k), (state.sink_v, expected.sink_v)]
    for recent, other in ((state.recent_k, expected.recent_k), (state.recent_v, expected.recent_v)):
        moved.append((recent.movedim(1, 2)[present], other.movedim(1, 2)[present]))
    if not all(torch.equal(a.to(b.dtype), b) for a, b in moved):
        return [float("inf")]
    return [relative(state.S, expected.S), relative(state.z, expected.z)]


class NoWaiting(TorchDispatchMode):
    """A context in which reading a tensor's values on the host fails, as in the capture of a CUDA graph."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert operation not in (aten._local_scalar_dense.default, aten.nonzero.default), operation
        return operation(*args, **(kwargs or {}))


def node_errors(parts, counts, steps=8, nodes=5, dtype=torch.float32, **shape):
    """Compute the relative errors of trees and decoding steps, and the largest error of the states.

    The steps are: a tree, tokens decoded one by one, paths of different lengths, a tree and one more token.
    """
    from linearize_kernels import chunked
    from linearize_kernels.ops.chunked import commit
    from linearize_kernels.reference.block import block
    from linearize_kernels.triton.nodes import commit_, decode_one_token, tree

    reference = node_layer(parts, **shape)
    attention = copy.deepcopy(reference).float()
    batch, counts = len(counts), torch.tensor(counts)

    def narrow(*tokens):
        return [x.to(dtype) for x in tokens]

    longest = max(1, int(counts.max()))
    valid = torch.arange(longest) >= longest - counts[:, None]
    _, expected = chunked(reference, None, *draw_tokens(reference, batch, longest, dtype), valid)
    state = expected.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    state = replace(state, S=expected.S.float(), z=expected.z.float()).map(torch.Tensor.contiguous).fork()
    expected = replace(expected, S=state.S.double(), z=state.z.double())
    decoded, trees, states = [], [], []

    def decode():
        nonlocal expected
        tokens = draw_tokens(reference, batch, 1, dtype)
        out, expected = chunked(reference, expected, *tokens)
        with NoWaiting():
            found = decode_one_token(attention, state, *narrow(*tokens))
        decoded.append((found, out))
        states.extend(state_errors(state, expected))

    def read():
        tokens, visible = draw_tokens(reference, batch, nodes, dtype), random_tree(nodes)
        position = expected.count[:, None] + visible.sum(-1) - 1
        position[0, 1:][~visible[1:, 1:].tril(-1).any(0)] = -1  # leaves are pads in the first row
        out = block(reference, expected, *tokens, position, visible)
        with NoWaiting():
            found = tree(attention, state, *narrow(*tokens), position, visible)
        present = position >= 0
        trees.append((found.movedim(1, 2)[present], out.movedim(1, 2)[present]))

    def accept():
        nonlocal expected
        _, k, v = draw_tokens(reference, batch, nodes, dtype)
        accepted = torch.arange(batch) * 2 + nodes - 1 - 2 * (batch - 1)
        valid = torch.arange(nodes) >= nodes - accepted[:, None]
        for path, own in (((k, v), valid), ((k[..., :2, :], v[..., :2, :]), None)):
            expected = commit(reference, expected, *path, own)
            with NoWaiting():
                commit_(attention, state, *narrow(*path), own)
            states.extend(state_errors(state, expected))

    before = state.fork()
    read()
    assert all(map(torch.equal, vars(state).values(), vars(before).values())), "a tree writes nothing"
    for _ in range(steps):
        decode()
    accept()
    read()
    decode()
    outs = {
        name: relative(*(torch.cat([x.flatten() for x in part]) for part in zip(*pairs, strict=True)))
        for name, pairs in (("decoded", decoded), ("tree", trees))
    }
    return dict(outs, state=max(states))
