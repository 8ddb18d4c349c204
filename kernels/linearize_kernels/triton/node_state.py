"""The kernels that write new tokens into a state, and their launchers. `node_kernels` explains the names.

Two kernels append T tokens. `take_in` writes the recent tokens, the sinks and z. `fold_path` then writes S
and the count. A token leaves when it is no longer among the R recent ones. It is then added to S and z.
"""

from typing import Any

from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.parts.far import CEILING
from linearize_kernels.state import State
from linearize_kernels.triton.common import INTERPRETED, load_tile, store_tile
from linearize_kernels.triton.tuning import padded

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise

HEAVIEST = tl.constexpr(CEILING)
# Dimensions of the values in a program: they fill whole memory lines of S, and a batch of one has enough programs.
SLICE = 32
SLOTS, DIMENSIONS, POSITIONS = 64, 64, 1024  # that a program works on at a time


@triton.jit
def load_vector(x, column, mask):
    """Load columns of a vector as fp32, zero where the mask is False."""
    return tl.load(x + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def count_arrived(valid, batch, T, BT: tl.constexpr):
    """Count the new tokens of one row of the batch that are not pads: all T if `valid` is None."""
    arrived = T
    if valid is not None:
        t = tl.arange(0, BT)
        arrived = tl.sum(tl.load(valid + batch * T + t, mask=t < T, other=0).to(tl.int32), 0)
    return arrived


@triton.jit
def fold_tokens(
    old, phi, v, oldest, arrived, f, e, T, SINKS: tl.constexpr, F: tl.constexpr, DV: tl.constexpr
):
    """Add the tokens that have left the recent ones to a slice of the running sum S, and return the slice.

    These are the oldest recent tokens, as many as new ones arrived. Sinks and empty slots are not added.

    Args:
        old: the slice of S.
        phi, v: `[T, F]` and `[T, Dv]`, the features and values of the T oldest recent tokens.
        oldest: the position of the first of them.
        arrived: the number of new tokens that are not pads.
        f, e: the indices of the slice in F and in Dv.
    """
    for t in range(T):
        folds = (oldest + t >= SINKS) & (oldest + t < oldest + arrived)
        left, value = (
            load_vector(phi + t * F, f, f < tl.where(folds, F, 0)),
            load_vector(v + t * DV, e, e < DV),
        )
        old += left[:, None] * value[None, :]
    return old


@triton.jit
def fold_path(
    S, phi_left, left_v, valid, recent_position, count, T,
    FAR: tl.constexpr, REPEATS: tl.constexpr, R: tl.constexpr, SINKS: tl.constexpr,
    DV: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add the tokens that T new ones have dropped from the recent tokens to a slice of one head's running sum
    S.

    One program of each row of the batch also writes the row's count.

    Args:
        phi_left, left_v: `[B, far, T, F]` and `[B, kv, T, Dv]`, the features and values of the T tokens that
            were the oldest recent ones.
        valid: `[B, T]` bool, False for pads among the T new tokens, or None.
        recent_position: `[B, R]`, positions of the recent tokens now.
    """
    state_head, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    batch, f = state_head // FAR, tl.arange(0, BF)
    arrived = count_arrived(valid, batch, T, BT)
    tokens = tl.load(recent_position + batch * R + R - 1).to(tl.int32) + 1
    if F > 0:
        S_tile = load_tile(S + state_head * F * DV, f, F, e, DV, False)
        left = (phi_left + state_head * T * F, left_v + state_head // REPEATS * T * DV)
        S_tile = fold_tokens(S_tile, left[0], left[1], tokens - arrived - R, arrived, f, e, T, SINKS, F, DV)
        store_tile(S + state_head * F * DV, S_tile, f, F, e, DV)
    if (state_head % FAR == 0) & (tl.program_id(1) == 0):
        tl.store(count + batch, tokens.to(tl.int64))


@triton.jit
def shift(
    recent, new, sink, tokens, arrived, column, T,
    R: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Append new tokens to the recent tokens of one KV head, in place: the oldest ones drop out.

    New tokens that are sinks are also stored as such. All threads read a slot before any of them writes it.

    Args:
        recent: `[R, WIDTH]`, the keys or values of the recent tokens.
        new: `[T, WIDTH]`, those of the new tokens. Only the last `arrived` of them are not pads.
        sink: `[SINKS, WIDTH]`, those of the sinks.
        tokens: the number of earlier tokens.
    """
    if SINKS > 0:
        t = tl.arange(0, BT)
        new_position = tokens + t - (T - arrived)
        is_sink = ((t < T) & (new_position >= tokens) & (new_position < SINKS))[:, None] & (column < WIDTH)[
            None, :
        ]
        sinks = tl.load(new + t[:, None] * WIDTH + column[None, :], mask=is_sink, other=0.0)
        tl.store(sink + new_position[:, None] * WIDTH + column[None, :], sinks, mask=is_sink)
    for s in range(0, R, BS):
        slot = s + tl.arange(0, BS)
        arrives = slot + arrived >= R
        kept = (slot + arrived < R)[:, None] & (column < WIDTH)[None, :]
        joins = (arrives & (slot < R))[:, None] & (column < WIDTH)[None, :]
        old = tl.load(recent + (slot + arrived)[:, None] * WIDTH + column[None, :], mask=kept, other=0.0)
        added = tl.load(new + (slot + T - R)[:, None] * WIDTH + column[None, :], mask=joins, other=0.0)
        tl.debug_barrier()
        value = tl.where(arrives[:, None], added, old)
        tl.store(recent + slot[:, None] * WIDTH + column[None, :], value, mask=kept | joins)


@triton.jit
def hedgehog(
    x, weight, key_weight, out, D: tl.constexpr, HALF: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute Hedgehog's features `[softmax(xW), softmax(-xW)]` (`feature_maps.Hedgehog`) of one vector.

    Args:
        x: `[D]`, a query or key.
        weight: `[D, HALF]`, W.
        key_weight: `[D + 1]`, the parameters of a learned weight of the key that multiplies the features, or
            None.
        out: `[2 HALF]`, is written.
    """
    h = tl.arange(0, BH)
    score = tl.zeros((BH,), tl.float32)
    logarithm = 0.0
    for first in range(0, D, BC):
        c = first + tl.arange(0, BC)
        x_part = load_vector(x, c, c < D)
        score += tl.sum(x_part[:, None] * load_tile(weight, c, D, h, HALF, UPCAST).to(tl.float32), 0)
        if key_weight is not None:
            logarithm += tl.sum(x_part * load_vector(key_weight, c, c < D), 0)
    omega = 1.0
    if key_weight is not None:
        logarithm += tl.load(key_weight + D).to(tl.float32)
        tanh = 1 - 2 / (tl.exp(logarithm / HEAVIEST * 2) + 1)
        omega = tl.exp(tanh * HEAVIEST)
    for half in tl.static_range(2):
        signed = tl.where(h < HALF, score if half == 0 else -score, float("-inf"))
        exponential = tl.exp(signed - tl.max(signed, 0))
        value = exponential * (omega / tl.sum(exponential, 0))
        tl.store(out + half * HALF + h, value, mask=h < HALF)


@triton.jit
def take_in(
    k, v, valid, recent_k, recent_v, recent_position, sink_k, sink_v, z, phi_left, left_v, count,
    q, phi_q, query_weight, map_weight, key_weight, T,
    KV: tl.constexpr, REPEATS: tl.constexpr, QUERIES: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Append T new tokens to the recent tokens of one KV head. The oldest ones drop out, and are added to z.

    The second axis of the grid splits the work: 0 handles keys and z, 1 handles values. With Hedgehog's
    weights and one token, each further index computes the features of one query head.

    Args:
        phi_left: `[B, far, T, F]`, features of the T oldest recent tokens. With Hedgehog's weights they are
            written here.
        left_v: `[B, kv, T, Dv]`, is written: the values of these tokens.
        query_weight, map_weight, key_weight: Hedgehog's weights for queries and keys, and those of the key
            weight ω, or None.
    """
    kv_head, task = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = kv_head // KV
    tokens = tl.load(count + batch).to(tl.int32)
    arrived = count_arrived(valid, batch, T, BT)
    if task == 0:
        for member in range(REPEATS):
            state_head = kv_head * REPEATS + member
            if map_weight is not None:
                head = kv_head % KV * REPEATS + member
                omega_weight = key_weight
                if key_weight is not None:
                    omega_weight = key_weight + head * (D + 1)
                weight = map_weight + head * D * (F // 2)
                oldest = recent_k + kv_head * R * D
                hedgehog(oldest, weight, omega_weight, phi_left + state_head * F, D, F // 2, BC, BH, UPCAST)
                tl.debug_barrier()
            if F > 0:
                f = tl.arange(0, BF)
                mass = load_vector(z + state_head * F, f, f < F)
                for t in range(T):
                    new_position = tokens - R + t
                    folds = (new_position >= SINKS) & (new_position < tokens - R + arrived)
                    mass += load_vector(phi_left + (state_head * T + t) * F, f, f < tl.where(folds, F, 0))
                tl.store(z + state_head * F + f, mass, mask=f < F)
        shift(
            recent_k + kv_head * R * D, k + kv_head * T * D, sink_k + kv_head * SINKS * D, tokens,
            arrived, tl.arange(0, BD), T, R, SINKS, D, BS, BT,
        )  # fmt: skip
        if kv_head % KV == 0:
            for s in range(0, R, BP):
                slot = s + tl.arange(0, BP)
                new_position = tl.maximum(tokens + arrived - R + slot, -1)
                tl.store(recent_position + batch * R + slot, new_position.to(tl.int64), mask=slot < R)
    elif task == 1:
        t, e = tl.arange(0, BT), tl.arange(0, BV)
        value = load_tile(recent_v + kv_head * R * DV, t, T, e, DV, False)
        store_tile(left_v + kv_head * T * DV, value, t, T, e, DV)
        shift(
            recent_v + kv_head * R * DV, v + kv_head * T * DV, sink_v + kv_head * SINKS * DV, tokens,
            arrived, e, T, R, SINKS, DV, BS, BT,
        )  # fmt: skip
    elif map_weight is not None:
        state_head = kv_head * QUERIES + task - 2
        weight = query_weight + (kv_head % KV * QUERIES + task - 2) * D * (F // 2)
        hedgehog(q + state_head * D, weight, None, phi_q + state_head * F, D, F // 2, BC, BH, UPCAST)


def geometry(attention: LinearAttention, state: State) -> dict[str, Any]:
    """Return the compile-time arguments that all node kernels share, by name."""
    eq = attention.equation
    return dict(
        REPEATS=eq.far_heads // eq.kv_heads, R=eq.recent, SINKS=eq.sinks, DV=eq.value_dim, F=state.S.shape[-2]
    )  # fmt: skip


def join(
    attention: LinearAttention,
    state: State,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    phi_left: Tensor | None,
    left_v: Tensor,
    queries: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write T new tokens into a state, in place, as its most recent ones. The oldest recent tokens drop out.

    The dropped tokens, one for each new token that is not a pad, are added to z. S and the count are written
    later, by `fold` or `attend_nodes`.

    Args:
        k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads, or None.
        phi_left: `[B, far, T, F]`, features of the T oldest recent tokens, or None without a linear part.
        left_v: `[B, kv, T, Dv]`, receives the values of these tokens.
        queries: q and phi_q of one token. With them, the kernel also computes Hedgehog's features of q and of
            the dropped key.
    """
    eq, sizes, new = attention.equation, geometry(attention, state), k.shape[-2]
    q = phi_q = query_weight = map_weight = key_weight = None
    far: Any = attention.far
    heads = eq.heads // eq.kv_heads
    if queries is not None:
        q, phi_q = queries
        query_weight, map_weight = far.q_map.weight, far.k_map.weight
        key_weight = far.key_weight
    take_in[(k.shape[0] * eq.kv_heads, 2 if queries is None else 2 + heads)](
        k, v, valid, state.recent_k, state.recent_v, state.recent_position, state.sink_k, state.sink_v,
        state.z, phi_left, left_v, state.count, q, phi_q, query_weight, map_weight, key_weight, new,
        KV=eq.kv_heads, QUERIES=heads, D=eq.key_dim, BD=padded(eq.key_dim), BV=padded(eq.value_dim),
        BF=padded(sizes["F"]), BS=min(SLOTS, padded(eq.recent)), BT=padded(new),
        BP=min(POSITIONS, padded(eq.recent)), BC=min(DIMENSIONS, padded(eq.key_dim)), BH=padded(sizes["F"] // 2),
        UPCAST=INTERPRETED, num_warps=8, num_stages=2, **sizes,
    )  # fmt: skip


def fold(
    attention: LinearAttention, state: State, valid: Tensor | None, phi_left: Tensor | None, left_v: Tensor
) -> None:
    """Add the tokens that `join` has dropped from the recent ones to the running sum S, and write the count.

    Args:
        valid: `[B, T]` bool, False for pads among the T new tokens, or None if there are none.
        phi_left: `[B, far, T, F]`, features of the T tokens that were the oldest recent ones, or None without
            a linear part.
        left_v: `[B, kv, T, Dv]`, the values of these tokens.
    """
    eq, sizes = attention.equation, geometry(attention, state)
    BV = min(SLICE, padded(eq.value_dim))
    fold_path[(state.S.shape[0] * eq.far_heads, triton.cdiv(eq.value_dim, BV))](
        state.S, phi_left, left_v, valid, state.recent_position, state.count, left_v.shape[-2],
        FAR=eq.far_heads, BV=BV, BF=padded(sizes["F"]), BT=padded(left_v.shape[-2]),
        num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip
