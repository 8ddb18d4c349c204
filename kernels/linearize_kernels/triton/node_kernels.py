"""The kernel that attends to a token tree or to one decoded token, and its launcher.

A node is a new token: one of a tree, or a single decoded one. In the node kernels of this folder, `batch` is
the index of a row of the batch, `state_head` that of a head of S in one row of the batch, and `kv_head` that
of a KV head in one row of the batch. A kernel's rows (`row`) are the queries of the T nodes in the query
heads of one state head, `[heads / far, T]`. The recent tokens are the last R of the text, so the number of
tokens determines their positions.

A decoding step launches two kernels. Programs of one launch never read what another program writes: `take_in`
reads the count and writes the recent tokens and their positions. `attend_nodes` reads these and writes the
count.
"""

from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.parts.combine import TINY
from linearize_kernels.parts.linformer import LOW
from linearize_kernels.state import State
from linearize_kernels.triton.common import INTERPRETED, load_tile, store_tile
from linearize_kernels.triton.node_state import SLICE, fold_tokens, geometry, load_vector
from linearize_kernels.triton.tuning import padded

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise

LOW_SCORE, TINY_TOTAL = tl.constexpr(LOW), tl.constexpr(TINY)
ROWS = 16  # rows of a program
FEATURES = 32  # features that a program multiplies at a time
SLOT_BYTES = 64 * 256  # bytes of the keys that a program loads at a time


@triton.jit
def product(a, b):
    """Compute `a b` on tensor cores.

    For fp32 it is three products in TF32, with the error of an fp32 product.
    """
    return tl.dot(a.to(b.dtype), b, input_precision="tf32x3")


@triton.jit
def inverse_norm(x):
    """Compute the inverse norm of every row of x. Norms are at least fp32's epsilon, as in
    `feature_maps.unit_norm`.
    """
    x = x.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1.1920928955078125e-07)


@triton.jit
def attend_slots(
    running_max, total, acc, conv_out, q_tile, q_position, mix, k, v, slot, end, key_position, seen, phi_q,
    row, rows, phi_k, far_end, conv, head, scale, e,
    SIZE: tl.constexpr, SOFTMAX: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the attention of some queries (rows) to a tile of keys (slots) to running sums.

    The sums are those of an online softmax, or plain sums without SOFTMAX. The conv's output is summed
    separately, in `conv_out`.

    Args:
        running_max, total, acc: the running maximum, normaliser and numerator.
        q_position, key_position: positions of the queries and of the keys.
        mix: the logit of the linear part of each query, or its factor without SOFTMAX.
        seen: True where a query may see a key.
        phi_k: `[far_end, F]`, features of the keys, or None if no key is outside the window of a query.

    Returns:
        The updated `running_max`, `total`, `acc` and `conv_out`.
    """
    keys, values = (
        load_tile(k, slot, end, tl.arange(0, BD), D, UPCAST),
        load_tile(v, slot, end, e, DV, UPCAST),
    )
    delay = q_position[:, None] - key_position[None, :]
    local = delay < SIZE if SOFTMAX else (q_position // SIZE)[:, None] == (key_position // SIZE)[None, :]
    local = local | (key_position < SINKS)[None, :]
    score = product(q_tile, tl.trans(keys))
    if SOFTMAX:
        score = tl.where(seen & local, score * scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(score, 1))
        rescale = tl.exp(running_max - new_max)
        weights = tl.exp(score - new_max[:, None])
        running_max = new_max
        total = total * rescale
        acc = acc * rescale[:, None]
    else:
        score = tl.maximum(score * inverse_norm(q_tile)[:, None] * inverse_norm(keys)[None, :], 0.0)
        weights = tl.where(seen & local, score * score, 0.0)
    if phi_k is not None:
        factor = tl.exp(mix - running_max) if SOFTMAX else mix
        far = tl.zeros(weights.shape, tl.float32)
        for first in range(0, F, BC):
            f = first + tl.arange(0, BC)
            far += product(
                load_tile(phi_q, row, rows, f, F, UPCAST),
                tl.trans(load_tile(phi_k, slot, far_end, f, F, UPCAST)),
            )
        weights += factor[:, None] * tl.where(seen & ~local, far, 0.0)
    total += tl.sum(weights, 1)
    acc += product(weights, values)
    if W > 0:
        reached = seen & (delay >= 0) & (delay < W)
        taps = tl.load(conv + (head[:, None] * W + delay), mask=reached, other=0.0).to(tl.float32)
        conv_out += product(taps, values)
    return running_max, total, acc, conv_out


@triton.jit
def attend_nodes(
    q, phi_q, far_weight, conv, sink_k, sink_v, recent_k, recent_v, phi_recent, k, v, phi_k, position,
    visible, S, z, phi_left, left_v, count, out, scale, T, recent_far,
    FAR: tl.constexpr, REPEATS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr,
    SOFTMAX: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BSINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of BM queries of one head of S, for a slice of the values' dimensions.

    For a tree, `k` and `v` are those of its nodes, with `position [B, T]` and `visible [T, T]`. Only `out` is
    written.

    For one decoded token, `k` is None: the token is already the last recent token, and `position [B, R]` has
    the positions of the recent tokens. `phi_left` and `left_v` belong to the token that left the recent ones.
    They are added to S before S is read, and the count is written.
    """
    state_head = tl.program_id(0).to(tl.int64)
    batch, kv_head = state_head // FAR, state_head // REPEATS
    first = tl.program_id(1) // tl.cdiv(DV, BV) * BM
    first_e = tl.program_id(1) % tl.cdiv(DV, BV) * BV
    row, e, d = first + tl.arange(0, BM), first_e + tl.arange(0, BV), tl.arange(0, BD)
    rows = GROUP * T
    node = row % T
    head = (state_head % FAR).to(tl.int32) * GROUP + tl.minimum(row // T, GROUP - 1)
    q_tile = load_tile(q + state_head * rows * D, row, rows, d, D, UPCAST)
    if F > 0:
        phi_q += state_head * rows * F
        if k is None:  # loaded early to hide the latency, used last
            f = tl.arange(0, BF)
            S_tile = load_tile(S + state_head * F * DV, f, F, e, DV, UPCAST)
    if k is None:
        tokens = tl.load(position + batch * R + R - 1).to(tl.int32) + 1
        q_position = tl.zeros((BM,), tl.int32) + tokens - 1
    else:
        tokens = tl.load(count + batch).to(tl.int32)
        q_position = tl.load(position + batch * T + node).to(tl.int32)

    running_max = tl.full((BM,), LOW_SCORE, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    conv_out = tl.zeros((BM, BV), tl.float32)
    mix = tl.zeros((BM,), tl.float32)
    if F > 0:
        if SOFTMAX:  # far_weight [heads, D + 1]
            weight = load_vector(far_weight, head[:, None] * (D + 1) + d[None, :], (d < D)[None, :])
            bias = tl.load(far_weight + head * (D + 1) + D).to(tl.float32)
            mix = tl.sum(q_tile.to(tl.float32) * weight, 1) + bias
            mix = tl.where(q_position >= SIZE + SINKS, mix, float("-inf"))
            running_max = tl.maximum(mix, running_max)
        else:  # far_weight [heads]
            mix = tl.load(far_weight + head).to(tl.float32)
    if SINKS > 0:
        sink = tl.arange(0, BSINK)
        stored = (sink < SINKS) & (sink < tokens)
        running_max, total, acc, conv_out = attend_slots(
            running_max, total, acc, conv_out, q_tile, q_position, mix, sink_k + kv_head * SINKS * D,
            sink_v + kv_head * SINKS * DV, sink, SINKS, sink, stored[None, :], phi_q, row, rows, None, 0,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UPCAST,
        )  # fmt: skip
    for s in range(0, R, BS):
        slot = s + tl.arange(0, BS)
        key_position = tokens - R + slot
        is_recent = (slot < R) & (key_position >= SINKS)
        running_max, total, acc, conv_out = attend_slots(
            running_max, total, acc, conv_out, q_tile, q_position, mix, recent_k + kv_head * R * D,
            recent_v + kv_head * R * DV, slot, R, key_position, is_recent[None, :], phi_q, row, rows,
            None if phi_recent is None else phi_recent + state_head * recent_far * F, recent_far,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UPCAST,
        )  # fmt: skip
    if k is not None:
        other = tl.arange(0, BT)
        node_position = tl.load(position + batch * T + other, mask=other < T, other=-1).to(tl.int32)
        seen = tl.load(visible + node[:, None] * T + other[None, :], mask=(other < T)[None, :], other=0) != 0
        running_max, total, acc, conv_out = attend_slots(
            running_max, total, acc, conv_out, q_tile, q_position, mix, k + kv_head * T * D,
            v + kv_head * T * DV, other, T, node_position, seen & (node_position >= 0)[None, :], phi_q, row, rows,
            None if phi_k is None else phi_k + state_head * T * F, T,
            conv, head, scale, e, SIZE, SOFTMAX, SINKS, D, DV, F, W, BD, BC, UPCAST,
        )  # fmt: skip
    if F > 0:
        factor = tl.exp(mix - running_max) if SOFTMAX else mix
        if k is None:
            left = (phi_left + state_head * F, left_v + kv_head * DV)
            S_tile = fold_tokens(S_tile, left[0], left[1], tokens - 1 - R, 1, f, e, 1, SINKS, F, DV)
            mass = load_vector(z + state_head * F, f, f < F)
            for member in range(GROUP):
                phi = load_vector(phi_q + member * F, f, f < F)
                member_factor = tl.where(row == member, factor, 0.0)
                total += member_factor * tl.sum(phi * mass, 0)
                acc += member_factor[:, None] * tl.sum(phi[:, None] * S_tile, 0)[None, :]
            store_tile(S + state_head * F * DV, S_tile, f, F, e, DV)
        else:
            for first_f in range(0, F, BC):
                f = first_f + tl.arange(0, BC)
                phi = load_tile(phi_q, row, rows, f, F, UPCAST) * factor[:, None]
                acc += product(phi, load_tile(S + state_head * F * DV, f, F, e, DV, UPCAST))
                total += tl.sum(phi * load_vector(z + state_head * F, f, f < F)[None, :], 1)
    if SOFTMAX:
        acc /= tl.maximum(total, TINY_TOTAL)[:, None]
    if k is None:
        if W > R:  # the conv's last tap reads the token that left
            value = load_vector(left_v + kv_head * DV, e, e < tl.where(tokens - 1 - R >= SINKS, DV, 0))
            conv_out += tl.load(conv + head * W + R).to(tl.float32)[:, None] * value[None, :]
        if (state_head % FAR == 0) & (first_e == 0):
            tl.store(count + batch, tokens.to(tl.int64))
    store_tile(out + state_head * rows * DV, acc + conv_out, row, rows, e, DV)


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
    """Run `attend_nodes` for the nodes of a token tree or for one decoded token, and write `out`.

    Args:
        attention: the layer's parameters.
        state: the state before the tree, or after `node_state.join` has stored the decoded token.
        q: `[B, heads, T, D]`.
        phi_q: `[B, far, g, T, F]`, the features of q, or None without a linear part.
        phi_recent: `[B, far, P, F]`, features of the P oldest recent tokens, or None if none of them can be
            far.
        out: `[B, heads, T, Dv]`, is written.
        tree: k, v, phi_k, position and visible of the nodes. None for a decoded token.
        left: for a decoded token, the features and the value of the token that left the recent ones.
    """
    eq, sizes = attention.equation, geometry(attention, state)
    nodes, group, softmax = q.shape[-2], eq.heads // eq.far_heads, eq.score == "softmax"
    k, v, phi_k, position, visible = tree or (None, None, None, state.recent_position, None)
    phi_left, left_v = left or (None, None)
    far_weight = None
    if attention.far is not None:
        far_weight = attention.combine.mix if softmax else attention.combine.factor
    heads, rows = q.shape[0] * eq.far_heads, group * nodes
    BD, BV, BF = padded(eq.key_dim), min(SLICE, padded(eq.value_dim)), padded(sizes["F"])
    BM, BS = padded(group) if tree is None else ROWS, min(64, SLOT_BYTES // (BD * q.element_size()))
    attend_nodes[(heads, triton.cdiv(rows, BM) * triton.cdiv(eq.value_dim, BV))](
        q, phi_q, far_weight, attention.conv, state.sink_k, state.sink_v, state.recent_k, state.recent_v,
        phi_recent, k, v, phi_k, position, visible, state.S, state.z, phi_left, left_v, state.count, out,
        eq.scale, nodes, 0 if phi_recent is None else phi_recent.shape[-2], FAR=eq.far_heads, GROUP=group,
        SIZE=eq.size, SOFTMAX=softmax, D=eq.key_dim, W=eq.conv_width, BD=BD, BV=BV,
        BF=BF, BC=min(FEATURES, BF), BM=BM, BS=min(BS, padded(eq.recent)), BT=padded(nodes),
        BSINK=padded(eq.sinks), UPCAST=INTERPRETED, num_warps=8 if tree is None else 4, num_stages=1, **sizes,
    )  # fmt: skip
