"""The forward kernel of the sliding form, and what its backward kernels share with it.

Positions are of the timeline: row t's own token is in slot R + t, so slot s is `R + t - s` behind it. Within its
chunk's columns it is near below `size` behind and far from there on, and the same ahead where AHEAD slots end columns.
`begins` are those of packed sequences, or None; packed rows see nothing ahead. What is not of a chunk's own sequence is
below `begins - SINKS`, or of a later chunk.
"""

import torch
from torch import Tensor

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.sliding import LOW, Shape, Tokens
from linearize_kernels.triton.common import INTERPRETED, band, dot, folded, folded_apart, put, tile
from linearize_kernels.triton.tuning import Packed, padded, tiles

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

LOWEST, LEAST = tl.constexpr(LOW), tl.constexpr(TINY)


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


@triton.jit(do_not_specialize=("start", "skip"))
def attend(
    q, k, v, phi_q, phi_k, mix, conv, S, z, sink_k, sink_v, out, log_total, scale, start, skip, begins,
    rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Outputs of BM rows of one query head, and the logarithm of their normaliser: `log_total [N, g, n C]`."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, F, AHEAD)
    skip = seen_from(begins, skip, first, C)
    first_sink, start = own_sinks(begins, skip, start, lane, slots, R, SINKS)
    k += lane * slots * D
    v += lane * slots * DV
    own_q = tile(q + head * rows * D, row, rows, d, D, UP)
    ceiling = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    if F > 0:
        own_mix = tl.load(mix + head * rows + row).to(tl.float32)
        ceiling = tl.maximum(own_mix, ceiling)
    for sink in range(SINKS):
        score = sink_scores(own_q, vector(sink_k + (first_sink + sink) * D, d, D), start + row, sink, scale)
        higher = tl.maximum(ceiling, score)
        shrink = tl.exp(ceiling - higher)
        weight = tl.exp(score - higher)
        ceiling = higher
        total = total * shrink + weight
        value = vector(sink_v + (first_sink + sink) * DV, e, DV)
        acc = acc * shrink[:, None] + weight[:, None] * value[None, :]
    if F > 0:
        chunk = lane * (rows // C) + first // C
        phi_q += head * rows * F
        phi_k += lane * slots * F
        factor = tl.exp(own_mix - ceiling)[:, None]
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = tile(phi_q, row, rows, f, F, UP) * factor
            acc += dot(phi, tile(S + chunk * F * DV, f, F, e, DV, UP))
            total += tl.sum(phi * tl.load(z + chunk * F + f, mask=f < F, other=0.0)[None, :], 1)
    for s in range(first_column(first, begins, skip, C, R, SIZE, F, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        near = near_scores(own_q, tile(k, slot, last, d, D, UP), row, slot, skip, rows, scale, R, SIZE, AHEAD)
        higher = tl.maximum(ceiling, tl.max(near, 1))
        shrink = tl.exp(ceiling - higher)
        weights = tl.exp(near - higher[:, None])
        ceiling = higher
        if F > 0:
            seen = is_far(R + row[:, None] - slot[None, :], SIZE, AHEAD)
            some = some_far(first, s, R, SIZE, AHEAD, BM, BS)
            far = products(phi_q, row, rows, phi_k, slot, last, some, seen, F, BF, UP)
            weights += tl.exp(own_mix - ceiling)[:, None] * far
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + dot(weights, tile(v, slot, last, e, DV, UP))
    total = tl.maximum(total, LEAST)
    acc /= total[:, None]
    if W > 0:
        AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
        last = last_column(first, BM, C, R, AT + 1, 0, AHEAD)
        for s in range(first_column(first, begins, skip, C, R, W - AT, 0, SINKS), last, BS):
            slot = s + tl.arange(0, BS)
            taps = band(conv + head * W, R + row[:, None] - slot[None, :] + AT, W)
            acc += dot(taps, tile(v, slot, last, e, DV, UP))
    put(out + head * rows * DV, acc, row, rows, e, DV)
    tl.store(log_total + head * rows + row, ceiling + tl.log(total))


def forward(
    shape: Shape, tokens: Tokens, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What `sliding.sliding` returns, and the logarithms of the normalisers, `[N, g, n C]`."""
    q = tokens.q
    lanes, group, rows = q.shape[:3]
    states, masses, S, z = older(shape, tokens, packed)
    sink_k, sink_v, begins = where_sinks_are(tokens, packed)
    out = q.new_empty(lanes, group, rows, tokens.v.shape[-1])
    log_total = q.new_empty(lanes, group, rows, dtype=torch.float32)
    own = sizes("attend", shape, tokens, packed)
    attend[(lanes * group, rows // own["BM"])](
        q, tokens.k, tokens.v, tokens.phi_q, tokens.phi_k, tokens.mix, tokens.conv, states, masses, sink_k, sink_v,
        out, log_total, shape.scale, shape.start, shape.skip, begins, rows, **own,
    )  # fmt: skip
    return out, S, z, log_total
