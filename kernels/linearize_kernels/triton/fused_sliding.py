"""The fused forward kernel of the sliding form, without gradients. `fused` explains slots and segments.

A program computes one head of a segment, chunk after chunk. After the chunk's queries have read S and z, the oldest C
slots that the chunk reads are added to them. `sliding_fwd` explains which keys are local and which are far.
"""

from torch import Tensor

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.sliding import LOW
from linearize_kernels.triton.common import dot, load_taps, load_tile
from linearize_kernels.triton.fused import (
    constants,
    few_values,
    load_tokens,
    read_sums,
    strides,
    sums,
)
from linearize_kernels.triton.fused_inputs import Features, Heads, Place, Window
from linearize_kernels.triton.sliding_fwd import load_vector, scores

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise

LOW_SCORE, TINY_TOTAL = tl.constexpr(LOW), tl.constexpr(TINY)


@triton.jit(do_not_specialize=("skip",))
def attend_segment(
    q, k, v, recent_k, recent_v, sink_v, phi_q, phi_k, logits, conv, S, z, out, length, slots, skip, places, scale,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, sink_row, sink_head, sink_token, out_row,
    out_head, out_token, SPAN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV: tl.constexpr, FAR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    MAP: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one segment of one query head, BV dimensions of the values.

    Args:
        sink_v: `[B, KV, SINKS, Dv]`.
        phi_q, phi_k: `[B HEADS, T, F]` and `[B FAR, slots, F]`, the features of queries and the weighted ones of keys.
        logits: `[B HEADS, 1 + SINKS, T]`, the logit of the linear part and the scores of the sinks.
        S, z: `[B FAR, places, F, Dv]` and `[B FAR, places, F]`, the sums before each segment.
        out: `[B, HEADS, T, Dv]`, is written.
        length: T.
        skip: the first slot that holds a key other than a sink's.
    """
    index, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = index // HEADS, index % HEADS
    kv_head, state_head = head // (HEADS // KV), batch * FAR + head // (HEADS // FAR)
    d, f, e = tl.arange(0, BD), tl.arange(0, BF), tl.program_id(2) * BV + tl.arange(0, BV)
    begin = segment * SPAN * C
    q += batch * q_row + head * q_head
    k += batch * k_row + kv_head * k_head
    v += batch * v_row + kv_head * v_head
    sink_v += batch * sink_row + kv_head * sink_head
    out += batch * out_row + head * out_head
    phi_q += index * length * F
    phi_k += state_head * slots * F
    logits += index * (1 + SINKS) * length
    if recent_k is not None:
        recent_k += (batch * KV + kv_head) * R * D
        recent_v += (batch * KV + kv_head) * R * DV
    WIDE: tl.constexpr = UPCAST or q.dtype.element_ty == tl.float32
    place = state_head * places + segment
    state_S = load_tile(S + place * F * DV, f, F, e, DV, UPCAST)
    state_z = tl.load(z + place * F + f, mask=f < F, other=0.0)
    for step in range(0, tl.minimum(SPAN, tl.cdiv(length - begin, C))):
        first = begin + step * C
        row = first + tl.arange(0, C)
        q_features = load_tile(phi_q, row, length, f, F, UPCAST)
        acc, total = read_sums(q_features, state_S, state_z, WIDE)  # zero for rows without far tokens
        mix = tl.load(logits + row, mask=row < length, other=0.0)
        running_max = tl.maximum(mix, LOW_SCORE)
        for sink in range(SINKS):
            score = tl.load(logits + (1 + sink) * length + row, mask=row < length, other=0.0)
            new_max = tl.maximum(running_max, score)
            rescale = tl.exp(running_max - new_max)
            weight = tl.exp(score - new_max)
            running_max = new_max
            total = total * rescale + weight
            value = load_vector(sink_v + sink * sink_token, e, DV)
            acc = acc * rescale[:, None] + weight[:, None] * value[None, :]
        q_tile = load_tokens(q, None, first, length, q_token, d, D, C, R, UPCAST)
        for s in range(first, first + C + R, C):
            slot = s + tl.arange(0, C)
            keys = load_tokens(k, recent_k, s - R, length, k_token, d, D, C, R, UPCAST)
            values = load_tokens(v, recent_v, s - R, length, v_token, e, DV, C, R, UPCAST)
            delay = R + row[:, None] - slot[None, :]
            local = scores(q_tile, keys, (delay >= 0) & (delay < SIZE) & (slot >= skip)[None, :], scale)
            new_max = tl.maximum(running_max, tl.max(local, 1))
            rescale = tl.exp(running_max - new_max)
            weights = tl.exp(local - new_max[:, None])
            running_max = new_max
            if s < first + C + R - SIZE:  # some are far, and S gets the oldest C slots
                k_features = load_tile(phi_k, slot, slots, f, F, UPCAST)
                far = tl.exp(mix - running_max)[:, None] * dot(q_features, tl.trans(k_features))
                weights += tl.where(delay >= SIZE, far, 0.0)
                if R > SIZE:
                    k_features = tl.where((slot < first + C)[:, None], k_features, 0.0)
                state_z += tl.sum(k_features.to(tl.float32), 0)
                state_S += dot(tl.trans(k_features), values)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + dot(weights, values)
        acc /= tl.maximum(total, TINY_TOTAL)[:, None]
        if W > 0:
            for s in range(first + max(R - W + 1, 0) // C * C, first + C + R, C):
                slot = s + tl.arange(0, C)
                values = load_tokens(v, recent_v, s - R, length, v_token, e, DV, C, R, UPCAST)
                acc += dot(load_taps(conv + head * W, R + row[:, None] - slot[None, :], W), values)
        pointers = out + first.to(tl.int64) * out_token + tl.arange(0, C)[:, None] * out_token + e[None, :]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=(row < length)[:, None] & (e < DV)[None, :])


def forward(
    heads: Heads,
    phi: Features,
    logits: Tensor,
    far_heads: int,
    place: Place,
    window: Window,
    conv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sliding form of T tokens.

    Args:
        phi, logits: made by `given_features`.
        far_heads: the number of heads of S.
        conv: `[heads, W]`, or None.

    Returns:
        The outputs `[B, heads, T, Dv]`, and S `[B, far, F, Dv]` and z `[B, far, F]` after the tokens.
    """
    q, k, v, sink_v = heads.q, heads.k, heads.v, window.sink_v
    S, z, S_after, z_after = sums(heads, phi, far_heads, place)
    batch, count, length, _ = q.shape
    out = q.new_empty(batch, length, count, v.shape[-1]).transpose(1, 2)
    options = constants(heads, phi, far_heads, place, few_values(q))
    attend_segment[(batch * count, place.segments, triton.cdiv(v.shape[-1], options["BV"]))](
        q, k, v, heads.recent_k, heads.recent_v, sink_v, phi.q, phi.k, logits, conv, S, z, out, length,
        place.lead + length, place.skip, S.shape[1], window.scale, *strides(q, k, v, sink_v, out), SIZE=window.size,
        HEADS=count, W=0 if conv is None else conv.shape[-1], SINKS=sink_v.shape[2], **options,
    )  # fmt: skip
    return out, S_after, z_after
