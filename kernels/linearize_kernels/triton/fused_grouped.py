"""The fused forward kernel of the group form, without gradients. `fused` explains slots and segments.

A program computes one head of a segment, group after group. It keeps S, to which it adds each group after the group's
queries have read it. Here slots count from the start of a group, so the kernel also computes outputs for slots before
the first new token, which it does not store.
"""

from torch import Tensor

from linearize_kernels.triton.common import dot, load_taps, load_tile
from linearize_kernels.triton.fused import (
    constants,
    features,
    few_values,
    key_features,
    load_tokens,
    read_sums,
    strides,
    sums,
    unit,
)
from linearize_kernels.triton.fused_inputs import TILE, Features, Heads, Place
from linearize_kernels.triton.grouped import relu_scores

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit(do_not_specialize=("skip", "lead"))
def attend_groups(
    q, k, v, recent_k, recent_v, phi_q, phi_k, key_weight, factor, conv, S, z, out, length, slots, skip, lead,
    places, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
    SPAN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, FAR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one segment of one query head, BV dimensions of the values.

    Args:
        phi_q, phi_k: see `fused_inputs.Features`.
        factor: `[heads]`, the linear part's factor.
        S, z: `[B FAR, places, F, Dv]` and `[B FAR, places, F]`, the sums before each segment.
        out: `[B, heads, T, Dv]`, is written.
        length: T.
        skip: the first slot that holds a token.
        lead: the slot of the first new token.
    """
    head, segment = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = head // HEADS, head % HEADS
    kv_head, state_head = head // (HEADS // KV), head // (HEADS // FAR)
    d, f, e = tl.arange(0, BD), tl.arange(0, BF), tl.program_id(2) * BV + tl.arange(0, BV)
    begin = tl.program_id(1) * SPAN * C
    q += batch * q_row + head * q_head
    k += batch * k_row + kv_head * k_head
    v += batch * v_row + kv_head * v_head
    out += batch * out_row + head * out_head
    if recent_k is not None:
        recent_k += (batch * KV + kv_head) * R * D
        recent_v += (batch * KV + kv_head) * R * DV
    if phi_q is not None:
        phi_q += (batch * HEADS + head) * length * F
        phi_k += (batch * FAR + state_head) * slots * F
    if key_weight is not None:
        key_weight += state_head * (D + 1)
    WIDE: tl.constexpr = UPCAST or q.dtype.element_ty == tl.float32
    far_factor = tl.load(factor + head).to(tl.float32)
    index = (batch * FAR + state_head) * places + segment
    state_S = load_tile(S + index * F * DV, f, F, e, DV, UPCAST)
    state_z = tl.load(z + index * F + f, mask=f < F, other=0.0)
    for step in range(0, tl.minimum(SPAN * C // BM, tl.cdiv(length + lead - begin, BM))):
        first = begin + step * BM  # the slot of the first row
        group_start, row = first // C * C, first - lead + tl.arange(0, BM)
        queries = load_tokens(q, None, first - lead, length, q_token, d, D, BM, R, UPCAST)
        if MAP == "given":
            q_features = load_tile(phi_q, tl.where(row >= 0, row, length), length, f, F, UPCAST)
        else:
            q_features = features(queries, d, D, MAP)
        acc, _ = read_sums(q_features, state_S, state_z, WIDE)
        acc *= far_factor
        queries = unit(queries)
        for s in range(group_start, first + BM, BM):
            slot = s + tl.arange(0, BM)
            keys = load_tokens(k, recent_k, s - lead, length, k_token, d, D, BM, R, UPCAST)
            values = load_tokens(v, recent_v, s - lead, length, v_token, e, DV, BM, R, UPCAST)
            delay = row[:, None] + lead - slot[None, :]
            weights = relu_scores(queries, unit(keys), delay >= 0)
            weights *= weights
            if W > 0:
                weights += load_taps(conv + head * W, delay, W)
            acc += dot(weights, values)
            if first + BM == group_start + C:  # S gets the group
                phi = key_features(
                    keys, phi_k, slot, slots, slot >= skip, key_weight, d, f, D, F, MAP, UPCAST
                )
                state_S += dot(tl.trans(phi), values)
        if W > 1:  # the conv also reads the last values of the group before
            tiles = tl.cdiv(tl.maximum(W - 1 - (first - group_start), 0), BM)
            for s in range(group_start - tiles * BM, group_start, BM):
                values = load_tokens(v, recent_v, s - lead, length, v_token, e, DV, BM, R, UPCAST)
                delay = row[:, None] + lead - (s + tl.arange(0, BM))[None, :]
                acc += dot(load_taps(conv + head * W, delay, W), values)
        pointers = (
            out + (first - lead).to(tl.int64) * out_token + tl.arange(0, BM)[:, None] * out_token + e[None, :]
        )
        stored = ((row >= 0) & (row < length))[:, None] & (e < DV)[None, :]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=stored)


def forward(
    heads: Heads, phi: Features, far_heads: int, place: Place, factor: Tensor, conv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the group form of T tokens.

    Args:
        far_heads: the number of heads of S.
        factor: `[heads]`.
        conv: `[heads, W]`, or None.

    Returns:
        The outputs `[B, heads, T, Dv]`, and S `[B, far, F, Dv]` and z `[B, far, F]` after the tokens.
    """
    q, k, v = heads.q, heads.k, heads.v
    S, z, S_after, z_after = sums(heads, phi, far_heads, place)
    batch, count, length, _ = q.shape
    out = q.new_empty(batch, length, count, v.shape[-1]).transpose(1, 2)
    options = constants(heads, phi, far_heads, place, few_values(q))
    attend_groups[(batch * count, place.segments, triton.cdiv(v.shape[-1], options["BV"]))](
        q, k, v, heads.recent_k, heads.recent_v, phi.q, phi.k, phi.key_weight, factor, conv, S, z, out, length,
        place.lead + length, place.skip, place.lead, S.shape[1], *strides(q, k, v, out), HEADS=count,
        W=0 if conv is None else conv.shape[-1], BM=min(TILE, place.chunk), **options,
    )  # fmt: skip
    return out, S_after, z_after
