"""The kernels of the group form.

Row t's own key is key t, and its own value is in slot R + t; the slots before the first key are for the conv alone.
Of packed sequences R is 0, so that `begins` are the first rows of each group's sequence; they are None otherwise.
Rows and slots gather what is theirs, so nothing is added atomically.
"""

import torch
from torch import Tensor

from linearize_kernels.torch_forms.chunks import Tiling
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.triton.common import INTERPRETED, band, dot, folded, folded_apart, put, tile
from linearize_kernels.triton.tuning import Packed, padded, tiles

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def positive(a, b, seen):
    """Scores `a bᵀ` that are seen and above zero; the others are zero."""
    return tl.where(seen, tl.maximum(dot(a, tl.trans(b)), 0.0), 0.0)


@triton.jit
def first_tap(row, begins, C: tl.constexpr, W: tl.constexpr):
    """The first key whose value the conv reads for rows from `row` on."""
    first = row - W + 1
    if begins is not None:
        first = tl.maximum(first, tl.load(begins + row // C))
    return first


@triton.jit
def group_attend(
    q, k, v, phi_q, factor, conv, S, out, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Outputs of BM rows of one query head: the group's own keys, S before it, the conv."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    opened = first // C * C
    k += lane * rows * D
    v += lane * (rows + R) * DV
    own_q = tile(q + head * rows * D, row, rows, d, D, UP)
    acc = tl.zeros((BM, BV), tl.float32)
    if F > 0:
        own_factor = tl.load(factor + head).to(tl.float32)
        chunk = lane * (rows // C) + first // C
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = tile(phi_q + head * rows * F, row, rows, f, F, UP) * own_factor
            acc += dot(phi, tile(S + chunk * F * DV, f, F, e, DV, UP))
    for s in range(opened, first + BM, BS):
        key = s + tl.arange(0, BS)
        delay = row[:, None] - key[None, :]
        weights = positive(own_q, tile(k, key, rows, d, D, UP), delay >= 0)
        weights *= weights
        if W > 0:
            weights += band(conv + head * W, delay, W)
        acc += dot(weights, tile(v, R + key, rows + R, e, DV, UP))
    if W > 0:
        for s in range(first_tap(first, begins, C, W), opened, BS):
            key = s + tl.arange(0, BS)
            taps = band(conv + head * W, row[:, None] - key[None, :], W)
            acc += dot(taps, tile(v, R + key, R + opened, e, DV, UP))
    put(out + head * rows * DV, acc, row, rows, e, DV)


@triton.jit
def group_query_gradients(
    q, k, v, d_out, d_q, taps, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """d_q of BM rows of one query head, and `taps [N, g, n C, W]`, which is `d_out · v` by delay, in packed
    sequences only within them.
    """
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    opened = first // C * C
    k += lane * rows * D
    v += lane * (rows + R) * DV
    own_q = tile(q + head * rows * D, row, rows, d, D, UP)
    own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
    acc = tl.zeros((BM, BD), tl.float32)
    for s in range(opened, first + BM, BS):
        key = s + tl.arange(0, BS)
        delay = row[:, None] - key[None, :]
        keys = tile(k, key, rows, d, D, UP)
        d_weights = dot(own_d, tl.trans(tile(v, R + key, rows + R, e, DV, UP)))
        if W > 0:
            spots = taps + head * rows * W + (row[:, None] * W + delay)
            tl.store(spots, d_weights, mask=(delay >= 0) & (delay < W))
        acc += dot(2 * positive(own_q, keys, delay >= 0) * d_weights, keys)
    if W > 0:
        for s in range(first_tap(first, begins, C, W), opened, BS):
            key = s + tl.arange(0, BS)
            delay = row[:, None] - key[None, :]
            d_weights = dot(own_d, tl.trans(tile(v, R + key, R + opened, e, DV, UP)))
            spots = taps + head * rows * W + (row[:, None] * W + delay)
            tl.store(spots, d_weights, mask=(delay < W) & (key < opened)[None, :])
    put(d_q + head * rows * D, acc, row, rows, d, D)


@triton.jit
def answers(
    a, S, phi, factor, out, total, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """`a Sᵀ` of BM rows of one head, `a [N, g, R + n C, Dv]`, with the S of their group.

    With `factor [N, g]`, `out` is scaled by it, and `total [N, g, n C]` is `phi · a Sᵀ`.
    """
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, e = first + tl.arange(0, BM), tl.arange(0, BV)
    chunk = lane * (rows // C) + first // C
    own = tile(a + head * (rows + R) * DV, R + row, rows + R, e, DV, UP)
    products = tl.zeros((BM,), tl.float32)
    for first_f in range(0, F, BF):
        f = first_f + tl.arange(0, BF)
        answer = dot(own, tl.trans(tile(S + chunk * F * DV, f, F, e, DV, UP)))
        if factor is not None:
            products += tl.sum(answer * tile(phi + head * rows * F, row, rows, f, F, UP), 1)
            answer *= tl.load(factor + head).to(tl.float32)
        put(out + head * rows * F, answer, row, rows, f, F)
    if factor is not None:
        tl.store(total + head * rows + row, products)


@triton.jit
def group_slot_gradients(
    q, k, v, phi_k, conv, d_S, d_out, d_k, d_v, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BS tokens of one group, or d_v of BS slots before the first key."""
    lane = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(1) - tl.cdiv(R, BS)) * BS
    key, d, e = first + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    place = tl.where(key >= 0, key, rows)  # at the end, where nothing is
    slot = tl.where(key >= -R, R + key, R + rows)
    own_k = tile(k + lane * rows * D, place, rows, d, D, UP)
    own_v = tile(v + lane * (rows + R) * DV, slot, rows + R, e, DV, UP)
    acc_k = tl.zeros((BS, BD), tl.float32)
    acc_v = tl.zeros((BS, BV), tl.float32)
    closed = tl.maximum(first + C, 0) // C * C
    for member in range(GROUP):
        head = lane * GROUP + member
        for t in range(tl.maximum(first, 0) // BM * BM, closed, BM):
            row = t + tl.arange(0, BM)
            delay = row[None, :] - key[:, None]
            own_q = tile(q + head * rows * D, row, rows, d, D, UP)
            own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
            score = positive(own_k, own_q, delay >= 0)
            acc_k += dot(2 * score * dot(own_v, tl.trans(own_d)), own_q)
            weights = score * score
            if W > 0:
                weights += band(conv + head * W, delay, W)
            acc_v += dot(weights, own_d)
        if W > 0:
            for t in range(closed, tl.minimum(first + BS - 1 + W, rows), BM):
                row = t + tl.arange(0, BM)
                delay = row[None, :] - key[:, None]
                if begins is not None:
                    delay = tl.where(tl.load(begins + t // C) <= first, delay, -1)
                taps = band(conv + head * W, delay, W)
                acc_v += dot(taps, tile(d_out + head * rows * DV, row, rows, e, DV, UP))
    if F > 0:
        chunk = lane * (rows // C) + tl.maximum(first, 0) // C
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = tile(phi_k + lane * rows * F, place, rows, f, F, UP)
            acc_v += dot(phi, tile(d_S + chunk * F * DV, f, F, e, DV, UP))
    put(d_k + lane * rows * D, acc_k, place, rows, d, D)
    put(d_v + lane * (rows + R) * DV, acc_v, slot, rows + R, e, DV)


def sizes(kernel: str, shape: Tiling, tokens: Groups) -> dict:
    """The keyword arguments of a kernel but `fold`."""
    key_dim, value_dim = tokens.q.shape[-1], tokens.v.shape[-1]
    own = tiles(kernel, max(key_dim, value_dim), tokens.q)
    features = 0 if tokens.phi_q is None else tokens.phi_q.shape[-1]
    return dict(
        GROUP=tokens.q.shape[1],
        C=shape.chunk,
        R=shape.recent,
        D=key_dim,
        DV=value_dim,
        F=features,
        W=0 if tokens.conv is None else tokens.conv.shape[-1],
        BD=padded(key_dim),
        BV=padded(value_dim),
        BF=min(own.features, padded(features)),
        BM=min(own.rows, shape.chunk),
        BS=min(own.slots, shape.chunk),
        UP=INTERPRETED,
        num_warps=own.warps,
        num_stages=own.stages,
    )


def sums(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None]:
    """S before each group, `[N, n, F, Dv]`, and with the first `folds`, of packed sequences None."""
    if tokens.phi_k is None:
        return None, None if tokens.S is None else tokens.S.clone()
    phi_k, v = tokens.phi_k[:, None], tokens.v[:, None]
    if packed is not None:
        return folded_apart(phi_k, v, shape.chunk, packed)
    chunks = tokens.k.shape[1] // shape.chunk
    states, _, S, _ = folded(phi_k, v, tokens.S, None, chunks, shape.chunk, folds=folds)
    return states, S


def forward(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `grouped` returns."""
    q, k, v, phi_q, _, factor, conv, _ = tokens
    lanes, group, rows = q.shape[:3]
    states, S = sums(shape, folds, tokens, packed)
    begins = None if packed is None else packed.begins
    out = q.new_empty(lanes, group, rows, v.shape[-1])
    own = sizes("group_attend", shape, tokens)
    group_attend[(lanes * group, rows // own["BM"])](
        q, k, v, phi_q, factor, conv, states, out, begins, rows, **own
    )
    return out, S


def backward(
    shape: Tiling, folds: int, tokens: Groups, d_out: Tensor, d_S: Tensor | None, packed: Packed | None = None
) -> Groups:
    """The gradients of `tokens`, from those of what `grouped` returns."""
    q, k, v, phi_q, phi_k, factor, conv, _ = tokens
    lanes, group, rows = q.shape[:3]
    grads = Groups(*(None if x is None else torch.empty_like(x) for x in tokens))
    begins, room = (None, q.new_empty) if packed is None else (packed.begins, q.new_zeros)
    taps = None if conv is None else room(*q.shape[:3], conv.shape[-1], dtype=torch.float32)
    own = sizes("group_query_gradients", shape, tokens)
    group_query_gradients[(lanes * group, rows // own["BM"])](
        q, k, v, d_out, grads.q, taps, begins, rows, **own
    )
    if conv is not None:
        grads.conv.copy_(taps.sum(2))

    d_states = None
    if phi_q is not None:
        own = sizes("answers", shape, tokens)
        states, _ = sums(shape, folds, tokens, packed)
        total = q.new_empty(lanes, group, rows, dtype=torch.float32)
        answers[(lanes * group, rows // own["BM"])](
            d_out, states, phi_q, factor, grads.phi_q, total, rows, **own | dict(R=0)
        )
        grads.factor.copy_(total.sum(-1))
        by_row = factor.float()[..., None].expand(-1, -1, rows).contiguous()
        if packed is None:
            chunks = rows // shape.chunk
            d_states, _, d_S, _ = folded(
                phi_q, d_out, d_S, None, chunks, shape.chunk, by_row, reverse=True, folds=folds
            )
        else:
            d_states, _ = folded_apart(phi_q, d_out, shape.chunk, packed, factor=by_row, reverse=True)
        answers[(lanes, rows // own["BM"])](
            v, d_states, None, None, grads.phi_k, None, rows, **own | dict(GROUP=1)
        )
    if packed is None:
        grads.S.copy_(d_S)
    own = sizes("group_slot_gradients", shape, tokens)
    slots = triton.cdiv(shape.recent, own["BS"]) + rows // own["BS"]
    group_slot_gradients[(lanes, slots)](
        q, k, v, phi_k, conv, d_states, d_out, grads.k, grads.v, begins, rows, **own
    )
    return grads
