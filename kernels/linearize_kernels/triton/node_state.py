"""The kernels of `triton_nodes` that write a state; terms and order as in `triton_node_kernels`."""

from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.parts.far import CEILING
from linearize_kernels.state import State
from linearize_kernels.triton.common import INTERPRETED, put, tile
from linearize_kernels.triton.tuning import padded

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

HEAVIEST = tl.constexpr(CEILING)
SLICE = 32  # of the values' dimensions: whole lines of memory in S, and programs enough at a batch of one
SLOTS, DIMENSIONS, POSITIONS = 64, 64, 1024  # at a time


@triton.jit
def vector(x, column, there):
    return tl.load(x + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def arrivals(valid, text, T, BT: tl.constexpr):
    """How many of the T new tokens a text takes in."""
    arrived = T
    if valid is not None:
        t = tl.arange(0, BT)
        arrived = tl.sum(tl.load(valid + text * T + t, mask=t < T, other=0).to(tl.int32), 0)
    return arrived


@triton.jit
def folded(old, phi, v, oldest, arrived, f, e, T, SINKS: tl.constexpr, F: tl.constexpr, DV: tl.constexpr):
    """A slice of S after the tokens that left: the oldest ones, as many as arrived, but for sinks and empty slots.

    Args:
        phi: `[T, F]`; v: `[T, Dv]`; oldest: the first one's position.
    """
    for t in range(T):
        folds = (oldest + t >= SINKS) & (oldest + t < oldest + arrived)
        left, value = vector(phi + t * F, f, f < tl.where(folds, F, 0)), vector(v + t * DV, e, e < DV)
        old += left[:, None] * value[None, :]
    return old


@triton.jit
def fold_path(
    S, phi_left, left_v, valid, recent_position, count, T,
    FAR: tl.constexpr, REPEATS: tl.constexpr, R: tl.constexpr, SINKS: tl.constexpr,
    DV: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A slice of a lane's S after the tokens that a path pushed out, and the texts' counts after it."""
    lane, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    text, f = lane // FAR, tl.arange(0, BF)
    arrived = arrivals(valid, text, T, BT)
    tokens = tl.load(recent_position + text * R + R - 1).to(tl.int32) + 1
    if F > 0:
        older = tile(S + lane * F * DV, f, F, e, DV, False)
        left = (phi_left + lane * T * F, left_v + lane // REPEATS * T * DV)
        older = folded(older, left[0], left[1], tokens - arrived - R, arrived, f, e, T, SINKS, F, DV)
        put(S + lane * F * DV, older, f, F, e, DV)
    if (lane % FAR == 0) & (tl.program_id(1) == 0):
        tl.store(count + text, tokens.to(tl.int64))


@triton.jit
def shift(
    recent, new, sink, tokens, arrived, column, T,
    R: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Columns of a key lane's recent tokens and of its sinks after the last `arrived` of T new ones.

    `recent [R, WIDTH]` moves within itself: each slot is read, by all threads, before any of them writes it.
    """
    if SINKS > 0:
        t = tl.arange(0, BT)
        place = tokens + t - (T - arrived)
        is_sink = ((t < T) & (place >= tokens) & (place < SINKS))[:, None] & (column < WIDTH)[None, :]
        sinks = tl.load(new + t[:, None] * WIDTH + column[None, :], mask=is_sink, other=0.0)
        tl.store(sink + place[:, None] * WIDTH + column[None, :], sinks, mask=is_sink)
    for s in range(0, R, BS):
        slot = s + tl.arange(0, BS)
        comes = slot + arrived >= R
        kept = (slot + arrived < R)[:, None] & (column < WIDTH)[None, :]
        joins = (comes & (slot < R))[:, None] & (column < WIDTH)[None, :]
        old = tl.load(recent + (slot + arrived)[:, None] * WIDTH + column[None, :], mask=kept, other=0.0)
        own = tl.load(new + (slot + T - R)[:, None] * WIDTH + column[None, :], mask=joins, other=0.0)
        tl.debug_barrier()
        value = tl.where(comes[:, None], own, old)
        tl.store(recent + slot[:, None] * WIDTH + column[None, :], value, mask=kept | joins)


@triton.jit
def hedgehog(
    x, weight, key_weight, out, D: tl.constexpr, HALF: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """`features.Hedgehog` of one vector x `[D]`, weight `[D, HALF]`; times ω of `far.FeatureMemory` with a
    `key_weight [D + 1]`.
    """
    h = tl.arange(0, BH)
    score = tl.zeros((BH,), tl.float32)
    logarithm = 0.0
    for first in range(0, D, BC):
        c = first + tl.arange(0, BC)
        own = vector(x, c, c < D)
        score += tl.sum(own[:, None] * tile(weight, c, D, h, HALF, UP).to(tl.float32), 0)
        if key_weight is not None:
            logarithm += tl.sum(own * vector(key_weight, c, c < D), 0)
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
    UP: tl.constexpr,
):  # fmt: skip
    """T new tokens join a key lane's recent ones, with an axis of the grid for its pieces: keys and z, values, and
    with Hedgehog's weights (`query_weight`, `map_weight` of keys, one token) the features of each query head.

    `phi_left [B, far, T, F]` are the features of the T oldest tokens, written here with Hedgehog's weights, and
    `left_v [B, kv, T, Dv]` their values, as they were; as many leave as arrive.
    """
    key_lane, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text = key_lane // KV
    tokens = tl.load(count + text).to(tl.int32)
    arrived = arrivals(valid, text, T, BT)
    if piece == 0:
        for member in range(REPEATS):
            lane = key_lane * REPEATS + member
            if map_weight is not None:
                head = key_lane % KV * REPEATS + member
                own_weight = key_weight
                if key_weight is not None:
                    own_weight = key_weight + head * (D + 1)
                weight = map_weight + head * D * (F // 2)
                oldest = recent_k + key_lane * R * D
                hedgehog(oldest, weight, own_weight, phi_left + lane * F, D, F // 2, BC, BH, UP)
                tl.debug_barrier()
            if F > 0:
                f = tl.arange(0, BF)
                mass = vector(z + lane * F, f, f < F)
                for t in range(T):
                    place = tokens - R + t
                    folds = (place >= SINKS) & (place < tokens - R + arrived)
                    mass += vector(phi_left + (lane * T + t) * F, f, f < tl.where(folds, F, 0))
                tl.store(z + lane * F + f, mass, mask=f < F)
        shift(
            recent_k + key_lane * R * D, k + key_lane * T * D, sink_k + key_lane * SINKS * D, tokens,
            arrived, tl.arange(0, BD), T, R, SINKS, D, BS, BT,
        )  # fmt: skip
        if key_lane % KV == 0:
            for s in range(0, R, BP):
                slot = s + tl.arange(0, BP)
                place = tl.maximum(tokens + arrived - R + slot, -1)
                tl.store(recent_position + text * R + slot, place.to(tl.int64), mask=slot < R)
    elif piece == 1:
        t, e = tl.arange(0, BT), tl.arange(0, BV)
        value = tile(recent_v + key_lane * R * DV, t, T, e, DV, False)
        put(left_v + key_lane * T * DV, value, t, T, e, DV)
        shift(
            recent_v + key_lane * R * DV, v + key_lane * T * DV, sink_v + key_lane * SINKS * DV, tokens,
            arrived, e, T, R, SINKS, DV, BS, BT,
        )  # fmt: skip
    elif map_weight is not None:
        lane = key_lane * QUERIES + piece - 2
        weight = query_weight + (key_lane % KV * QUERIES + piece - 2) * D * (F // 2)
        hedgehog(q + lane * D, weight, None, phi_q + lane * F, D, F // 2, BC, BH, UP)


def geometry(attention: LinearAttention, state: State) -> dict:
    """The sizes that all kernels take."""
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
    """Takes k, v `[B, kv, T, D]` into the state, but for S and the count.

    Args:
        phi_left: `[B, far, T, F]`, features of the T oldest recent tokens; left_v: `[B, kv, T, Dv]`, is written.
        queries: q and phi_q of one token, if Hedgehog's features of both are to be written here.
    """
    eq, sizes, new = attention.equation, geometry(attention, state), k.shape[-2]
    q = phi_q = query_weight = map_weight = key_weight = None
    heads = eq.heads // eq.kv_heads
    if queries is not None:
        q, phi_q = queries
        query_weight, map_weight = attention.far.q_map.weight, attention.far.k_map.weight
        key_weight = attention.far.key_weight
    take_in[(k.shape[0] * eq.kv_heads, 2 if queries is None else 2 + heads)](
        k, v, valid, state.recent_k, state.recent_v, state.recent_position, state.sink_k, state.sink_v,
        state.z, phi_left, left_v, state.count, q, phi_q, query_weight, map_weight, key_weight, new,
        KV=eq.kv_heads, QUERIES=heads, D=eq.key_dim, BD=padded(eq.key_dim), BV=padded(eq.value_dim),
        BF=padded(sizes["F"]), BS=min(SLOTS, padded(eq.recent)), BT=padded(new),
        BP=min(POSITIONS, padded(eq.recent)), BC=min(DIMENSIONS, padded(eq.key_dim)), BH=padded(sizes["F"] // 2),
        UP=INTERPRETED, num_warps=8, num_stages=2, **sizes,
    )  # fmt: skip


def fold(
    attention: LinearAttention, state: State, valid: Tensor | None, phi_left: Tensor | None, left_v: Tensor
) -> None:
    """What `join` leaves: S and the count."""
    eq, sizes = attention.equation, geometry(attention, state)
    BV = min(SLICE, padded(eq.value_dim))
    fold_path[(state.S.shape[0] * eq.far_heads, triton.cdiv(eq.value_dim, BV))](
        state.S, phi_left, left_v, valid, state.recent_position, state.count, left_v.shape[-2],
        FAR=eq.far_heads, BV=BV, BF=padded(sizes["F"]), BT=padded(left_v.shape[-2]),
        num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip
