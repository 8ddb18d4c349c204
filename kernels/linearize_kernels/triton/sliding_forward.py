"""The forward kernel of `triton_sliding`."""

import torch
from torch import Tensor

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.sliding_lane import LOW, Shape, Tokens
from linearize_kernels.torch_forms.tiles import Packed
from linearize_kernels.triton.parts import band, dot, put, tile
from linearize_kernels.triton.sliding_parts import (
    first_column,
    is_far,
    last_column,
    near_scores,
    older,
    own_sinks,
    products,
    seen_from,
    sink_scores,
    sizes,
    some_far,
    vector,
    where_sinks_are,
)

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

LOWEST, LEAST = tl.constexpr(LOW), tl.constexpr(TINY)


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
