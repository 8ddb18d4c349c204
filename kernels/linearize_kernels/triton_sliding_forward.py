"""The forward kernels of `triton_sliding`, and what its backward shares with them.

Positions are of the timeline: row t's own token is in slot R + t, so slot s is `R + t - s` behind it; within its
chunk's columns it is near below `size` behind and far from there on. `begins` are those of packed sequences, or None;
what is not of a chunk's own sequence is below `begins - SINKS` there, or of a later chunk.
"""

import torch
from torch import Tensor

from linearize_kernels.combine import TINY
from linearize_kernels.sliding import LOW, Shape, Tokens
from linearize_kernels.tiles import Packed
from linearize_kernels.triton_parts import INTERPRETED, band, dot, folded, folded_apart, put, tile
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
def near_scores(q, k, row, slot, skip, scale, R: tl.constexpr, SIZE: tl.constexpr):
    delay = R + row[:, None] - slot[None, :]
    return scores(q, k, (delay >= 0) & (delay < SIZE) & (slot >= skip)[None, :], scale)


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


@triton.jit(do_not_specialize=("start", "skip"))
def attend(
    q, k, v, phi_q, phi_k, mix, conv, S, z, sink_k, sink_v, out, log_total, scale, start, skip, begins,
    rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Outputs of BM rows of one query head, and the logarithm of their normaliser: `log_total [N, g, n C]`."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    last = first + BM + R
    skip = seen_from(begins, skip, first, C)
    first_sink, start = own_sinks(begins, skip, start, lane, rows + R, R, SINKS)
    k += lane * (rows + R) * D
    v += lane * (rows + R) * DV
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
        phi_k += lane * (rows + R) * F
        factor = tl.exp(own_mix - ceiling)[:, None]
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = tile(phi_q, row, rows, f, F, UP) * factor
            acc += dot(phi, tile(S + chunk * F * DV, f, F, e, DV, UP))
            total += tl.sum(phi * tl.load(z + chunk * F + f, mask=f < F, other=0.0)[None, :], 1)
    for s in range(first_column(first, begins, skip, C, R, SIZE, F, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        near = near_scores(own_q, tile(k, slot, last, d, D, UP), row, slot, skip, scale, R, SIZE)
        higher = tl.maximum(ceiling, tl.max(near, 1))
        shrink = tl.exp(ceiling - higher)
        weights = tl.exp(near - higher[:, None])
        ceiling = higher
        if F > 0:
            is_far = R + row[:, None] - slot[None, :] >= SIZE
            far = products(phi_q, row, rows, phi_k, slot, last, last - s > SIZE, is_far, F, BF, UP)
            weights += tl.exp(own_mix - ceiling)[:, None] * far
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + dot(weights, tile(v, slot, last, e, DV, UP))
    total = tl.maximum(total, LEAST)
    acc /= total[:, None]
    if W > 0:
        for s in range(first_column(first, begins, skip, C, R, W, 0, SINKS), last, BS):
            slot = s + tl.arange(0, BS)
            taps = band(conv + head * W, R + row[:, None] - slot[None, :], W)
            acc += dot(taps, tile(v, slot, last, e, DV, UP))
    put(out + head * rows * DV, acc, row, rows, e, DV)
    tl.store(log_total + head * rows + row, ceiling + tl.log(total))


def sizes(kernel: str, shape: Shape, tokens: Tokens, packed: Packed | None) -> dict:
    """The keyword arguments of a kernel that works on rows and slots."""
    own = tiles(kernel, max(tokens.q.shape[-1], tokens.v.shape[-1]), tokens.q)
    features = 0 if tokens.phi_q is None else tokens.phi_q.shape[-1]
    return dict(
        GROUP=tokens.q.shape[1],
        C=shape.chunk,
        R=shape.recent,
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
    """S and z before each chunk and after the last; without a far part nothing is added to them. Packed sequences have
    none after the last.
    """
    if tokens.phi_k is None:
        return None, None, *(None if x is None else x.clone() for x in (tokens.S, tokens.z))
    phi_k, v = tokens.phi_k[:, None], tokens.v[:, None]
    if packed is not None:
        return *folded_apart(phi_k, v, shape.chunk, packed, packed.begins, with_z=True), None, None
    return folded(phi_k, v, tokens.S, tokens.z, tokens.q.shape[2] // shape.chunk, shape.chunk)


def where_sinks_are(tokens: Tokens, packed: Packed | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the sinks are, and `begins`."""
    return (tokens.sink_k, tokens.sink_v, None) if packed is None else (tokens.k, tokens.v, packed.begins)


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
