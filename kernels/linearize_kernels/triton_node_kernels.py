"""The kernels of `triton_nodes`.

A text is a row of the batch. A lane is a head of S of a text, a key lane a KV head of a text; a lane's rows are its
query heads' nodes, `[heads / far, T]`. A text's recent tokens are its last R, so its count says where each of them is.

A decoding step is two launches. What programs share, the first only writes or the second only reads: `take_in` reads
the count and writes the recent tokens and their positions, `attend_nodes` reads these and writes the count.
"""

import torch
from torch import Tensor

from linearize_kernels.attention import LinearAttention
from linearize_kernels.combine import TINY
from linearize_kernels.far import CEILING, LOW
from linearize_kernels.state import State
from linearize_kernels.triton_parts import INTERPRETED, put, tile
from linearize_kernels.triton_tiles import padded

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

LOWEST, LEAST, HEAVIEST = tl.constexpr(LOW), tl.constexpr(TINY), tl.constexpr(CEILING)
SLICE = 32  # of the values' dimensions: whole lines of memory in S, and programs enough at a batch of one
ROWS, FEATURES, DIMENSIONS = 16, 32, 64  # of a program, and at a time
SLOT_BYTES = 64 * 256  # of the keys that are worked on at a time


@triton.jit
def product(a, b):
    """`a b` on tensor cores; of fp32 as three products of tf32, whose error is that of fp32."""
    return tl.dot(a.to(b.dtype), b, input_precision="tf32x3")


@triton.jit
def vector(x, column, there):
    return tl.load(x + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x):
    """Of the rows of x, as `features.unit_norm` takes it."""
    x = x.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1.1920928955078125e-07)


@triton.jit
def take_columns(
    ceiling, total, acc, tapped, own_q, own, mix, k, v, slot, end, key_position, seen, phi_q, row, rows,
    phi_k, far_end, conv, head, scale, e,
    SIZE: tl.constexpr, SOFTMAX: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The tokens in some slots of k and v: sums under one running maximum, and what the conv takes of them.

    Args:
        own, key_position: of the rows and of the slots.
        seen: by row and slot.
        phi_k: `[far_end, F]`, of the slots that may be far; None: none is.
    """
    keys, values = tile(k, slot, end, tl.arange(0, BD), D, UP), tile(v, slot, end, e, DV, UP)
    delay = own[:, None] - key_position[None, :]
    if SOFTMAX:
        near = delay < SIZE
    else:
        near = (own // SIZE)[:, None] == (key_position // SIZE)[None, :]
    near = near | (key_position < SINKS)[None, :]
    score = product(own_q, tl.trans(keys))
    if SOFTMAX:
        score = tl.where(seen & near, score * scale, float("-inf"))
        higher = tl.maximum(ceiling, tl.max(score, 1))
        shrink = tl.exp(ceiling - higher)
        weights = tl.exp(score - higher[:, None])
        ceiling = higher
        total = total * shrink
        acc = acc * shrink[:, None]
    else:
        score = tl.maximum(score * inverse_norm(own_q)[:, None] * inverse_norm(keys)[None, :], 0.0)
        weights = tl.where(seen & near, score * score, 0.0)
    if phi_k is not None:
        factor = tl.exp(mix - ceiling) if SOFTMAX else mix
        far = tl.zeros(weights.shape, tl.float32)
        for first in range(0, F, BC):
            f = first + tl.arange(0, BC)
            far += product(tile(phi_q, row, rows, f, F, UP), tl.trans(tile(phi_k, slot, far_end, f, F, UP)))
        weights += factor[:, None] * tl.where(seen & ~near, far, 0.0)
    total += tl.sum(weights, 1)
    acc += product(weights, values)
    if W > 0:
        reached = seen & (delay >= 0) & (delay < W)
        taps = tl.load(conv + (head[:, None] * W + delay), mask=reached, other=0.0).to(tl.float32)
        tapped += product(taps, values)
    return ceiling, total, acc, tapped


@triton.jit
def arrivals(valid, text, T, BT: tl.constexpr):
    """How many of the T new tokens a text takes in."""
    arrived = T
    if valid is not None:
        t = tl.arange(0, BT)
        arrived = tl.sum(tl.load(valid + text * T + t, mask=t < T, other=0).to(tl.int32), 0)
    return arrived


@triton.jit
def folded(
    old, phi, v, oldest, arrived, f, e, T, SINKS: tl.constexpr, F: tl.constexpr, DV: tl.constexpr
):
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
def attend_nodes(
    q, phi_q, far_weight, conv, sink_k, sink_v, recent_k, recent_v, phi_recent, k, v, phi_k, position, visible,
    S, z, phi_left, left_v, count, out, scale, T, recent_far,
    FAR: tl.constexpr, REPEATS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, SOFTMAX: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BC: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BSINK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """BM rows of a lane and a slice of the values.

    Of a tree, `k` and `v` are its nodes, `position [B, T]` theirs, `visible [T, T]`; nothing is written but `out`. Of
    one token, which is the last of the recent ones already, k is None, `position [B, R]` is that of the recent tokens,
    and `phi_left` and `left_v` are of the token that left: S takes it in before it is read, and count is written.
    """
    lane = tl.program_id(0).to(tl.int64)
    text, key_lane = lane // FAR, lane // REPEATS
    first = tl.program_id(1) // tl.cdiv(DV, BV) * BM
    first_e = tl.program_id(1) % tl.cdiv(DV, BV) * BV
    row, e, d = first + tl.arange(0, BM), first_e + tl.arange(0, BV), tl.arange(0, BD)
    rows = GROUP * T
    node = row % T
    head = (lane % FAR).to(tl.int32) * GROUP + tl.minimum(row // T, GROUP - 1)
    own_q = tile(q + lane * rows * D, row, rows, d, D, UP)
    if F > 0:
        phi_q += lane * rows * F
        if k is None:  # asked for first, used last
            f = tl.arange(0, BF)
            older = tile(S + lane * F * DV, f, F, e, DV, UP)
    if k is None:
        tokens = tl.load(position + text * R + R - 1).to(tl.int32) + 1
        own = tl.zeros((BM,), tl.int32) + tokens - 1
    else:
        tokens = tl.load(count + text).to(tl.int32)
        own = tl.load(position + text * T + node).to(tl.int32)

    ceiling = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    tapped = tl.zeros((BM, BV), tl.float32)
    mix = tl.zeros((BM,), tl.float32)
    if F > 0:
        if SOFTMAX:  # far_weight [heads, D + 1]
            weight = vector(far_weight, head[:, None] * (D + 1) + d[None, :], (d < D)[None, :])
            bias = tl.load(far_weight + head * (D + 1) + D).to(tl.float32)
            mix = tl.sum(own_q.to(tl.float32) * weight, 1) + bias
            mix = tl.where(own >= SIZE + SINKS, mix, float("-inf"))
            ceiling = tl.maximum(mix, ceiling)
        else:  # far_weight [heads]
            mix = tl.load(far_weight + head).to(tl.float32)
    if SINKS > 0:
        sink = tl.arange(0, BSINK)
        stored = (sink < SINKS) & (sink < tokens)
        ceiling, total, acc, tapped = take_columns(
            ceiling, total, acc, tapped, own_q, own, mix, sink_k + key_lane * SINKS * D,
            sink_v + key_lane * SINKS * DV, sink, SINKS, sink, stored[None, :], phi_q, row, rows, None, 0,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UP,
        )  # fmt: skip
    for s in range(0, R, BS):
        slot = s + tl.arange(0, BS)
        key_position = tokens - R + slot
        there = (slot < R) & (key_position >= SINKS)
        ceiling, total, acc, tapped = take_columns(
            ceiling, total, acc, tapped, own_q, own, mix, recent_k + key_lane * R * D,
            recent_v + key_lane * R * DV, slot, R, key_position, there[None, :], phi_q, row, rows,
            None if phi_recent is None else phi_recent + lane * recent_far * F, recent_far,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UP,
        )  # fmt: skip
    if k is not None:
        other = tl.arange(0, BT)
        place = tl.load(position + text * T + other, mask=other < T, other=-1).to(tl.int32)
        seen = tl.load(visible + node[:, None] * T + other[None, :], mask=(other < T)[None, :], other=0) != 0
        ceiling, total, acc, tapped = take_columns(
            ceiling, total, acc, tapped, own_q, own, mix, k + key_lane * T * D, v + key_lane * T * DV, other, T,
            place, seen & (place >= 0)[None, :], phi_q, row, rows,
            None if phi_k is None else phi_k + lane * T * F, T,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UP,
        )  # fmt: skip
    if F > 0:
        factor = tl.exp(mix - ceiling) if SOFTMAX else mix
        if k is None:
            left = (phi_left + lane * F, left_v + key_lane * DV)
            older = folded(older, left[0], left[1], tokens - 1 - R, 1, f, e, 1, SINKS, F, DV)
            mass = vector(z + lane * F, f, f < F)
            for member in range(GROUP):
                phi = vector(phi_q + member * F, f, f < F)
                here = tl.where(row == member, factor, 0.0)
                total += here * tl.sum(phi * mass, 0)
                acc += here[:, None] * tl.sum(phi[:, None] * older, 0)[None, :]
            put(S + lane * F * DV, older, f, F, e, DV)
        else:
            for first_f in range(0, F, BC):
                some = first_f + tl.arange(0, BC)
                phi = tile(phi_q, row, rows, some, F, UP) * factor[:, None]
                acc += product(phi, tile(S + lane * F * DV, some, F, e, DV, UP))
                total += tl.sum(phi * vector(z + lane * F, some, some < F)[None, :], 1)
    if SOFTMAX:
        acc /= tl.maximum(total, LEAST)[:, None]
    if k is None:
        if W > R:  # the conv's last tap is on the token that left
            value = vector(left_v + key_lane * DV, e, e < tl.where(tokens - 1 - R >= SINKS, DV, 0))
            tapped += tl.load(conv + head * W + R).to(tl.float32)[:, None] * value[None, :]
        if (lane % FAR == 0) & (first_e == 0):
            tl.store(count + text, tokens.to(tl.int64))
    put(out + lane * rows * DV, acc + tapped, row, rows, e, DV)


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
                hedgehog(recent_k + key_lane * R * D, weight, own_weight, phi_left + lane * F, D, F // 2, BC, BH, UP)
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
            recent_k + key_lane * R * D, k + key_lane * T * D, sink_k + key_lane * SINKS * D, tokens, arrived,
            tl.arange(0, BD), T, R, SINKS, D, BS, BT,
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
            recent_v + key_lane * R * DV, v + key_lane * T * DV, sink_v + key_lane * SINKS * DV, tokens, arrived, e,
            T, R, SINKS, DV, BS, BT,
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


def attend(
    attention: LinearAttention, state: State, q: Tensor, phi_q: Tensor | None, phi_recent: Tensor | None, out: Tensor,
    tree: tuple[Tensor | None, ...] | None = None, left: tuple[Tensor | None, Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes `out [B, heads, T, Dv]`.

    Args:
        phi_q: `[B, far, g, T, F]`; phi_recent: `[B, far, P, F]`, of the P oldest recent tokens; None: none is far.
        tree: k, v, phi_k, position and visible of its nodes; None: of one token, which the state has taken in but for
            S and the count, with `left`, the features and value of the token that left.
    """
    eq, sizes = attention.equation, geometry(attention, state)
    nodes, group, softmax = q.shape[-2], eq.heads // eq.far_heads, eq.score == "softmax"
    k, v, phi_k, position, visible = tree or (None, None, None, state.recent_position, None)
    phi_left, left_v = left or (None, None)
    far_weight = None
    if attention.far is not None:
        far_weight = attention.combine.mix if softmax else attention.combine.factor
    lanes, rows = q.shape[0] * eq.far_heads, group * nodes
    BD, BV, BF = padded(eq.key_dim), min(SLICE, padded(eq.value_dim)), padded(sizes["F"])
    BM, BS = padded(group) if tree is None else ROWS, min(64, SLOT_BYTES // (BD * q.element_size()))
    attend_nodes[(lanes, triton.cdiv(rows, BM) * triton.cdiv(eq.value_dim, BV))](
        q, phi_q, far_weight, attention.conv, state.sink_k, state.sink_v, state.recent_k, state.recent_v, phi_recent,
        k, v, phi_k, position, visible, state.S, state.z, phi_left, left_v, state.count, out, eq.scale,
        nodes, 0 if phi_recent is None else phi_recent.shape[-2], FAR=eq.far_heads, GROUP=group,
        SIZE=eq.size, SOFTMAX=softmax, D=eq.key_dim, W=eq.conv_width, BD=BD, BV=BV,
        BF=BF, BC=min(FEATURES, BF), BM=BM, BS=min(BS, padded(eq.recent)), BT=padded(nodes),
        BSINK=padded(eq.sinks), UP=INTERPRETED, num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip


def join(
    attention: LinearAttention, state: State, k: Tensor, v: Tensor, valid: Tensor | None, phi_left: Tensor | None,
    left_v: Tensor, queries: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
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
        k, v, valid, state.recent_k, state.recent_v, state.recent_position, state.sink_k, state.sink_v, state.z,
        phi_left, left_v, state.count, q, phi_q, query_weight, map_weight, key_weight, new,
        KV=eq.kv_heads, QUERIES=heads, D=eq.key_dim, BD=padded(eq.key_dim), BV=padded(eq.value_dim),
        BF=padded(sizes["F"]), BS=min(64, padded(eq.recent)), BT=padded(new), BP=min(1024, padded(eq.recent)),
        BC=min(DIMENSIONS, padded(eq.key_dim)), BH=padded(sizes["F"] // 2), UP=INTERPRETED,
        num_warps=8, num_stages=2, **sizes,
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
