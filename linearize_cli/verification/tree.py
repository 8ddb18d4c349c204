"""The check `tree`: the logits of every node of a token tree against those of its path decoded one token at a
time.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from linearize_kernels.reference.visibility import ancestors, chain
from torch import Tensor
from torch.nn.functional import kl_div, pad
from transformers import Cache, DynamicCache

from linearize_cli.metrics.equivalence import difference
from linearize_cli.metrics.memory import state_bytes
from linearize_cli.models.decoding import forward, pad_left
from linearize_cli.runtime.dispatch import converted
from linearize_cli.runtime.tree import Shape
from linearize_cli.verification.check import Finding, Subject, compared, refused

BYTES, ROWS = 1 << 29, 16  # the most bytes of states, and rows, in memory at once
FLOOR = 2  # in half precision, the limit is this many times the measured rounding noise
DEEPEST = 65  # the most nodes of the chain that is deeper than the window


@dataclass
class Gap:
    """The differences between the logits of tree nodes and of the same tokens decoded one at a time.

    A node crosses a window boundary if its window has lost a token that the window of the token before the
    tree still contains.

    Attributes:
        nodes: the number of nodes compared.
        inside: the largest difference of a node that crosses no window or group boundary. None without such
            nodes.
        crossing: the largest difference of a node that crosses one. None without such nodes.
        floor: the largest difference through rounding alone: the same paths in one chunk against token by
            token.
        kl: the sum of KL(decoded ‖ tree) over the nodes, in nats.
        flips: the number of nodes whose most probable token differs.
    """

    nodes: int = 0
    inside: float | None = None
    crossing: float | None = None
    floor: float = 0.0
    kl: float = 0.0
    flips: int = 0

    def add(self, actual: Tensor, expected: Tensor, crossing: Tensor) -> None:
        """Add the differences between the logits of M tree nodes and of the same tokens decoded one at a
        time.

        Args:
            actual: the logits `[M, vocab]` of the tree nodes.
            expected: the logits `[M, vocab]` of the decoded tokens.
            crossing: `[M]` bool, the nodes that cross a window or group boundary.
        """
        self.nodes += len(actual)
        self.flips += int((actual.argmax(-1) != expected.argmax(-1)).sum())
        p, q = (x.float().log_softmax(-1) for x in (expected, actual))
        self.kl += kl_div(q, p, reduction="sum", log_target=True).item()
        for name, some in (("inside", ~crossing), ("crossing", crossing)):
            if some.any():
                diff = difference(actual[some], expected[some])
                setattr(self, name, max(getattr(self, name) or 0.0, diff))


def tree(subject: Subject) -> Finding:
    """Compare the logits of a token tree's nodes with those of the same tokens decoded one at a time.

    The prefixes before the tree have many lengths, so that nodes cross a window or group boundary at every
    offset. A node crosses one if its window no longer contains a token that the window of the prefix's last
    token contains. In half precision the limit is twice the rounding noise: the difference between single
    tokens and the same path as a chunk.
    """
    if subject.no_tree:
        return refused(subject, "tree", subject.no_tree)
    visible, depth = ancestors(tuple(subject.parents))
    lengths = swept(subject.size, subject.context - int(depth.max()) - 1)
    paths = leaf_paths(visible, depth)
    batch = min(ROWS, max(1, BYTES // (state_bytes(subject.model) * len(paths))))
    gap = Gap()
    for first in range(0, len(lengths), batch):
        compare(subject, lengths[first : first + batch], paths, gap)
    deep = chain(min(subject.size + 1, DEEPEST))
    start = subject.size + 3
    if not subject.quick and start + len(deep) < subject.context:
        compare(replace(subject, parents=deep), [start], leaf_paths(*ancestors(deep)), gap)
    largest = max(x for x in (gap.inside, gap.crossing) if x is not None)
    limit = subject.comparison().limit
    if subject.half:
        rounding = torch.finfo(subject.model.dtype).eps * subject.largest
        limit = min(limit, FLOOR * max(gap.floor, rounding))
    data = {
        "max_abs_diff": largest,
        "crossing_max_abs_diff": gap.crossing,
        "inside_max_abs_diff": gap.inside,
        "offsets_swept": len({length % subject.size for length in lengths}),
        "nodes": len(depth),
        "kl": max(0.0, gap.kl / gap.nodes),
        "top1_flips": gap.flips,
    }
    more = "" if gap.crossing is None else f" ({gap.crossing:.1e} across window boundaries)"
    if subject.half:
        more += f", KL {data['kl']:.1e}, {gap.flips} of {gap.nodes:,} top tokens differ"
    return compared("tree", largest, limit, {"tree": data}, more)


def swept(size: int, longest: int) -> list[int]:
    """Return lengths of prefixes up to `longest`: a few shorter than a window of `size` tokens, then `size`
    consecutive ones.
    """
    lengths = {1, 3, size // 2, size - 1, *range(size, 2 * size)}
    return sorted(n for n in lengths if 1 <= n <= longest)


def leaf_paths(visible: Tensor, depth: Tensor) -> Tensor:
    """Return the nodes on the path from the root to each leaf, `[leaves, depth + 1]`, padded with -1.

    Args:
        visible: `[N, N]` bool, the ancestors of each of N nodes, itself included.
        depth: `[N]`, the depth of each node.
    """
    leaves = (visible.sum(0) == 1).nonzero()[:, 0]
    nodes = [visible[leaf].nonzero()[:, 0] for leaf in leaves]
    return torch.stack([pad(path, (0, int(depth.max()) + 1 - len(path)), value=-1) for path in nodes])


def compare(subject: Subject, lengths: list[int], paths: Tensor, gap: Gap) -> None:
    """Compare a token tree after prefixes of several lengths with its paths decoded token by token.

    Args:
        lengths: the lengths of the prefixes, which make one left-padded batch.
        paths: the nodes on the path to each leaf, `[leaves, depth + 1]`, padded with -1.
        gap: collects the differences.
    """
    model, rows, paths = subject.model, subject.rows, paths.to(subject.model.device)
    source = subject.random_tokens(len(lengths), max(lengths) + len(subject.parents))
    nodes = source[:, -len(subject.parents) :]
    texts = [(rows if n <= rows.shape[1] else source)[i % len(rows), :n] for i, n in enumerate(lengths)]
    ids, mask = pad_left(texts)
    cache = DynamicCache(config=model.config)
    forward(model, ids, cache, mask)
    read = model.read_tree(cache, nodes, subject.parents)
    crosses = crossing(subject, read.shape)
    row = torch.arange(len(lengths), device=model.device).repeat_interleave(len(paths))
    node = paths.repeat(len(lengths), 1)
    tokens, mask = nodes[row[:, None], node.clamp_min(0)], mask[row]
    decoded = singles(subject, branched(cache, row), tokens, mask)
    chunk = None
    if subject.half:
        grown = pad(mask, (0, tokens.shape[1]), value=1)
        chunk = forward(model, tokens, branched(cache, row), grown)
    for depth, logits in enumerate(decoded):
        own = node[:, depth] >= 0
        place = row[own], node[own, depth]
        gap.add(read.logits[place], logits[own], crosses[place])
        if chunk is not None:
            gap.floor = max(gap.floor, difference(chunk[own, depth], logits[own]))


def branched(cache: Cache, row: Tensor) -> Cache:
    """Return a copy of a cache whose rows are the rows `row [M]` (indices) of the given one. An index may
    repeat.
    """
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(row)
    return copied


def singles(subject: Subject, cache: Cache, tokens: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Decode tokens `[M, D]` one at a time, and yield the logits `[M, vocab]` after each of the D tokens.

    Args:
        mask: the mask `[M, T]` of the tokens in the cache.
    """
    for token in tokens.split(1, 1):
        mask = pad(mask, (0, 1), value=1)
        yield forward(subject.model, token, cache, mask)[:, -1]


def crossing(subject: Subject, shape: Shape) -> Tensor:
    """Return a mask `[B, N]` of the tree nodes that cross a window or group boundary in any layer."""
    position, crosses = shape.position, torch.zeros_like(shape.position, dtype=torch.bool)
    last = position.amin(-1, keepdim=True) - 1  # the root's position is the number of tokens in the row
    before = torch.arange(int(last.max()) + 1, device=position.device).expand(len(position), -1)
    for module in converted(subject.model).values():
        near = module.linear_attention.equation.near
        lost = near(last, before) & (before <= last)[:, None] & ~near(position, before)
        crosses |= lost.any(-1)
    return crosses
