"""The kernels of `triton_nodes`.

A text is a row of the batch. A lane is a head of S of a text, a key lane a KV head of a text; a lane's rows are its
query heads' nodes, `[heads / far, T]`. A text's recent tokens are its last R, so its count says where each of them is.

A decoding step is two launches. What programs share, the first only writes or the second only reads: `take_in` reads
the count and writes the recent tokens and their positions, `attend_nodes` reads these and writes the count.
"""

from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.parts.combine import TINY
from linearize_kernels.parts.linformer import LOW
from linearize_kernels.state import State
from linearize_kernels.triton.common import INTERPRETED, put, tile
from linearize_kernels.triton.node_state import SLICE, folded, geometry, vector
from linearize_kernels.triton.tuning import padded

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

LOWEST, LEAST = tl.constexpr(LOW), tl.constexpr(TINY)
ROWS, FEATURES = 16, 32  # of a program, and at a time
SLOT_BYTES = 64 * 256  # of the keys that are worked on at a time


@triton.jit
def product(a, b):
    """`a b` on tensor cores; of fp32 as three products of tf32, whose error is that of fp32."""
    return tl.dot(a.to(b.dtype), b, input_precision="tf32x3")


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
    near = delay < SIZE if SOFTMAX else (own // SIZE)[:, None] == (key_position // SIZE)[None, :]
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
def attend_nodes(
    q, phi_q, far_weight, conv, sink_k, sink_v, recent_k, recent_v, phi_recent, k, v, phi_k, position,
    visible, S, z, phi_left, left_v, count, out, scale, T, recent_far,
    FAR: tl.constexpr, REPEATS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr,
    SOFTMAX: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BSINK: tl.constexpr, UP: tl.constexpr,
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
            ceiling, total, acc, tapped, own_q, own, mix, k + key_lane * T * D, v + key_lane * T * DV, other,
            T, place, seen & (place >= 0)[None, :], phi_q, row, rows,
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


def attend(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    phi_q: Tensor | None,
    phi_recent: Tensor | None,
    out: Tensor,
    tree: tuple[Tensor | None, ...] | None = None,
    left: tuple[Tensor | None, Tensor] | None = None,
) -> None:
    """Writes `out [B, heads, T, Dv]`.

    Args:
        phi_q: `[B, far, g, T, F]`.
        phi_recent: `[B, far, P, F]`, of the P oldest recent tokens; None: none of them is far.
        tree: k, v, phi_k, position and visible of its nodes; None: q is of one token, which `join` has taken in.
        left: then the features and the value of the token that left.
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
        q, phi_q, far_weight, attention.conv, state.sink_k, state.sink_v, state.recent_k, state.recent_v,
        phi_recent, k, v, phi_k, position, visible, state.S, state.z, phi_left, left_v, state.count, out,
        eq.scale, nodes, 0 if phi_recent is None else phi_recent.shape[-2], FAR=eq.far_heads, GROUP=group,
        SIZE=eq.size, SOFTMAX=softmax, D=eq.key_dim, W=eq.conv_width, BD=BD, BV=BV,
        BF=BF, BC=min(FEATURES, BF), BM=BM, BS=min(BS, padded(eq.recent)), BT=padded(nodes),
        BSINK=padded(eq.sinks), UP=INTERPRETED, num_warps=8 if tree is None else 4, num_stages=1, **sizes,
    )  # fmt: skip
