"""The forward kernels of `triton_sliding`, and what its backward shares with them.

Positions are of the timeline: row t's own token is in slot R + t, so slot s is `R + t - s` behind it; within its
chunk's columns it is near below `size` behind and far from there on, and the same ahead where AHEAD slots end columns.
"""

import torch
from torch import Tensor

from linearize_kernels.combine import TINY
from linearize_kernels.sliding import LOW, Shape, Tokens
from linearize_kernels.triton_parts import INTERPRETED, band, dot, folded, put, tile
from linearize_kernels.triton_tiles import padded, tiles

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
def first_column(row, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr):
    """The first slot that rows from `row` on read: their chunk's first column, or without far ones REACH back."""
    first = row // C * C
    if F == 0:
        first = tl.maximum(first, row + R - REACH + 1)
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


@triton.jit(do_not_specialize=("start", "skip"))
def attend(
    q, k, v, phi_q, phi_k, mix, conv, S, z, sink_k, sink_v, out, log_total, scale, start, skip, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Outputs of BM rows of one query head, and the logarithm of their normaliser: `log_total [N, g, n C]`."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, F, AHEAD)
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
        score = sink_scores(own_q, vector(sink_k + (lane * SINKS + sink) * D, d, D), start + row, sink, scale)
        higher = tl.maximum(ceiling, score)
        shrink = tl.exp(ceiling - higher)
        weight = tl.exp(score - higher)
        ceiling = higher
        total = total * shrink + weight
        value = vector(sink_v + (lane * SINKS + sink) * DV, e, DV)
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
    for s in range(first_column(first, C, R, SIZE, F), last, BS):
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
        for s in range(first_column(first, C, R, W - AT, 0), last, BS):
            slot = s + tl.arange(0, BS)
            taps = band(conv + head * W, R + row[:, None] - slot[None, :] + AT, W)
            acc += dot(taps, tile(v, slot, last, e, DV, UP))
    put(out + head * rows * DV, acc, row, rows, e, DV)
    tl.store(log_total + head * rows + row, ceiling + tl.log(total))


def sizes(kernel: str, shape: Shape, tokens: Tokens) -> dict:
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
        BD=padded(tokens.q.shape[-1]),
        BV=padded(tokens.v.shape[-1]),
        BF=min(own.features, padded(features)),
        BM=min(own.rows, shape.chunk),
        BS=min(own.slots, shape.chunk),
        UP=INTERPRETED,
        num_warps=own.warps,
        num_stages=own.stages,
    )


def older(shape: Shape, tokens: Tokens) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """S and z outside each chunk's columns, and after the last chunk; without a far part nothing is added to them."""
    if tokens.phi_k is None:
        return None, None, tokens.S.clone(), tokens.z.clone()
    chunks = tokens.q.shape[2] // shape.chunk
    own = tokens.phi_k[:, None], tokens.v[:, None]
    states, masses, S, z = folded(*own, tokens.S, tokens.z, chunks, shape.chunk)
    if shape.ahead:
        behind = *own, torch.zeros_like(S), torch.zeros_like(z), chunks, shape.chunk
        folded(*behind, reverse=True, onto=(states, masses), start=shape.around)
    return states, masses, S, z


def forward(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `sliding.sliding` returns, and the logarithms of the normalisers, `[N, g, n C]`."""
    q = tokens.q
    lanes, group, rows = q.shape[:3]
    states, masses, S, z = older(shape, tokens)
    out = q.new_empty(lanes, group, rows, tokens.v.shape[-1])
    log_total = q.new_empty(lanes, group, rows, dtype=torch.float32)
    own = sizes("attend", shape, tokens)
    attend[(lanes * group, rows // own["BM"])](
        q, tokens.k, tokens.v, tokens.phi_q, tokens.phi_k, tokens.mix, tokens.conv, states, masses,
        tokens.sink_k, tokens.sink_v, out, log_total, shape.scale, shape.start, shape.skip, rows,
        SINKS=tokens.sink_k.shape[1], **own,
    )  # fmt: skip
    return out, S, z, log_total
