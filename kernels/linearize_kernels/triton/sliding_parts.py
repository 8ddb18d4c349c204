"""What the forward and the backward kernels of `triton_sliding` share.

Positions are of the timeline: row t's own token is in slot R + t, so slot s is `R + t - s` behind it; within its
chunk's columns it is near below `size` behind and far from there on, and the same ahead where AHEAD slots end columns.
`begins` are those of packed sequences, or None, as they are where AHEAD is above 0: packed rows see nothing ahead. What
is not of a chunk's own sequence is below `begins - SINKS` there, or of a later chunk.
"""

import torch
from torch import Tensor

from linearize_kernels.torch_forms.sliding_lane import Shape, Tokens
from linearize_kernels.torch_forms.tiles import Packed
from linearize_kernels.triton.parts import INTERPRETED, dot, folded, folded_apart, tile
from linearize_kernels.triton.tiles import padded, tiles

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def scores(a, b, seen, scale):
    """`a bᵀ` scaled, -inf where not seen."""
    return tl.where(seen, dot(a, tl.trans(b)) * scale, float("-inf"))


@triton.jit
def is_near(delay, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    least = 0 if AHEAD == 0 else 1 - SIZE
    return (delay >= least) & (delay < SIZE)


@triton.jit
def is_far(delay, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    far = delay >= SIZE
    if AHEAD > 0:
        far = far | (delay <= -SIZE)
    return far


@triton.jit
def some_far(
    row, slot, R: tl.constexpr, SIZE: tl.constexpr, AHEAD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr
):
    """Whether one of BM rows and one of BS slots are far from one another."""
    some = R + row + BM - slot > SIZE
    if AHEAD > 0:
        some = some | (slot + BS - R - row > SIZE)
    return some


@triton.jit
def is_there(slot, skip, end, AHEAD: tl.constexpr):
    """Whether a slot holds a token and no sink; without slots ahead no row reads behind the end."""
    there = slot >= skip
    if AHEAD > 0:
        there = there & (slot < end)
    return there


@triton.jit
def near_scores(q, k, row, slot, skip, rows, scale, R: tl.constexpr, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    near = is_near(R + row[:, None] - slot[None, :], SIZE, AHEAD)
    return scores(q, k, near & is_there(slot, skip, R + rows, AHEAD)[None, :], scale)


@triton.jit
def delays(slot, row, begins, skip, R: tl.constexpr, SINKS: tl.constexpr):
    """How far slots are behind rows of one chunk, `[slots, rows]`; in packed sequences, -1 behind those of another."""
    delay = R + row[None, :] - slot[:, None]
    if begins is not None:
        delay = tl.where((slot >= skip - SINKS)[:, None], delay, -1)
    return delay


@triton.jit
def seen_from(begins, skip, row, C: tl.constexpr):
    """The first slot that a row's chunk sees as a key that is no sink."""
    if begins is not None:
        skip = tl.load(begins + row // C)
    return skip


@triton.jit
def own_sinks(begins, skip, start, lane, slots, R: tl.constexpr, SINKS: tl.constexpr):
    """The first sink's place among all of them, and row 0's position; a packed sequence's sinks are its first slots."""
    place = lane * SINKS
    if begins is not None:
        place = lane * slots + skip - SINKS
        start = R + SINKS - skip
    return place, start


@triton.jit
def vector(x, column, WIDTH: tl.constexpr):
    return tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def sink_scores(q, key, position, sink, scale):
    """Of one sink, whose position is its number: `q [rows, D]`, `key [D]`."""
    return tl.where(position >= sink, tl.sum(q.to(tl.float32) * key[None, :], 1) * scale, float("-inf"))


@triton.jit
def products(
    a, a_row, a_end, b, b_row, b_end, some, seen, F: tl.constexpr, BF: tl.constexpr, UP: tl.constexpr
):
    """`φ_a φ_bᵀ` of rows of `a [., F]` and `b [., F]`, 0 where not seen; unless `some`, none is."""
    out = tl.zeros(seen.shape, tl.float32)
    if some:
        for first in range(0, F, BF):
            f = first + tl.arange(0, BF)
            out += dot(tile(a, a_row, a_end, f, F, UP), tl.trans(tile(b, b_row, b_end, f, F, UP)))
    return tl.where(seen, out, 0.0)


@triton.jit
def first_column(
    row, begins, skip, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, SINKS: tl.constexpr
):  # fmt: skip
    """The first slot that rows from `row` on read: their chunk's first column, or without far ones REACH back; in
    packed sequences, none before their own.
    """
    first = row // C * C
    if F == 0:
        first = tl.maximum(first, row + R - REACH + 1)
    if begins is not None:
        first = tl.maximum(first, skip - SINKS)
    return first


@triton.jit
def last_column(
    row, BM: tl.constexpr, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """The end of the slots that BM rows from `row` on read: their own; ahead, their chunk's last column, or without
    far ones REACH on.
    """
    last = row + BM + R
    if AHEAD > 0:
        end = row // C * C + R + C + AHEAD
        last = tl.minimum(end, last + REACH - 1) if F == 0 else end
    return last


@triton.jit
def first_row(
    slot, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, AHEAD: tl.constexpr
):
    """The first row that reads one of the slots from `slot` on, which are of one chunk: its own; where rows see ahead,
    the first whose chunk's columns hold it, or without far ones REACH back.
    """
    first = slot - R
    if AHEAD > 0:
        begin = slot // C * C - R - AHEAD
        first = tl.maximum(begin, first - REACH + 1) if F == 0 else begin
    return tl.maximum(first, 0)


def sizes(kernel: str, shape: Shape, tokens: Tokens, packed: Packed | None) -> dict:
    """The keyword arguments of a kernel that works on rows and slots."""
    own = tiles(kernel, max(tokens.q.shape[-1], tokens.v.shape[-1]), tokens.q)
    features = 0 if tokens.phi_q is None else tokens.phi_q.shape[-1]
    return dict(
        GROUP=tokens.q.shape[1],
        C=shape.chunk,
        R=shape.recent,
        AHEAD=shape.ahead,
        SIZE=shape.size,
        D=tokens.q.shape[-1],
        DV=tokens.v.shape[-1],
        F=features,
        W=0 if tokens.conv is None else tokens.conv.shape[-1],
        SINKS=tokens.sink_k.shape[1] if packed is None else packed.sinks,
        BD=padded(tokens.q.shape[-1]),
        BV=padded(tokens.v.shape[-1]),
        BF=min(own.features, padded(features)),
        BM=min(own.rows, shape.chunk),
        BS=min(own.slots, shape.chunk),
        UP=INTERPRETED,
        num_warps=own.warps,
        num_stages=own.stages,
    )


def older(
    shape: Shape, tokens: Tokens, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """S and z outside each chunk's columns, and after the last chunk; without a far part nothing is added to them.
    Packed sequences have none after the last.
    """
    if tokens.phi_k is None:
        return None, None, *(None if x is None else x.clone() for x in (tokens.S, tokens.z))
    own, chunks = (tokens.phi_k[:, None], tokens.v[:, None]), tokens.q.shape[2] // shape.chunk
    if packed is not None:
        return *folded_apart(*own, shape.chunk, packed, packed.begins, with_z=True), None, None
    states, masses, S, z = folded(*own, tokens.S, tokens.z, chunks, shape.chunk)
    if shape.ahead:
        behind = *own, torch.zeros_like(S), torch.zeros_like(z), chunks, shape.chunk
        folded(*behind, reverse=True, onto=(states, masses), start=shape.around)
    return states, masses, S, z


def where_sinks_are(tokens: Tokens, packed: Packed | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the sinks are, and `begins`."""
    return (tokens.sink_k, tokens.sink_v, None) if packed is None else (tokens.k, tokens.v, packed.begins)
