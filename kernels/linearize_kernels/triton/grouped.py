"""The kernels of the group form, and their launchers.

The token of query row t has key t, and its value is in slot R + t. The R slots before the first key hold
older values, which only the conv reads. For packed sequences R is 0, and `begins` has the first row of each
group's sequence. Otherwise `begins` is None. Every program sums the gradients of its own rows or slots, so no
kernel adds atomically. The names in capitals are explained in `common`; W is the conv's width.
"""

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.torch_forms.chunks import Tiling
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.triton.common import (
    INTERPRETED,
    chunk_states,
    dot,
    load_taps,
    load_tile,
    packed_states,
    store_tile,
)
from linearize_kernels.triton.tuning import Packed, padded, tiles

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def relu_scores(a, b, seen):
    """Compute the scores `relu(a bᵀ)`, zero where `seen` is False."""
    return tl.where(seen, tl.maximum(dot(a, tl.trans(b)), 0.0), 0.0)


@triton.jit
def first_tap(row, begins, C: tl.constexpr, W: tl.constexpr):
    """Return the index of the earliest key whose value the conv reads for query `row` and the rows after it.

    It is W - 1 before `row`, but not before the start of a packed sequence.
    """
    first = row - W + 1
    if begins is not None:
        first = tl.maximum(first, tl.load(begins + row // C))
    return first


@triton.jit
def group_attend(
    q, k, v, phi_q, factor, conv, S, out, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of BM query rows of one query head.

    An output is the sum of three parts: the tokens of the row's own group, the running sum S of all earlier
    groups, and the conv.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    group_start = first // C * C
    k += state_head * rows * D
    v += state_head * (rows + R) * DV
    q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
    acc = tl.zeros((BM, BV), tl.float32)
    if F > 0:
        factor_tile = tl.load(factor + head).to(tl.float32)
        chunk = state_head * (rows // C) + first // C
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = load_tile(phi_q + head * rows * F, row, rows, f, F, UPCAST) * factor_tile
            acc += dot(phi, load_tile(S + chunk * F * DV, f, F, e, DV, UPCAST))
    for s in range(group_start, first + BM, BS):
        key = s + tl.arange(0, BS)
        delay = row[:, None] - key[None, :]
        weights = relu_scores(q_tile, load_tile(k, key, rows, d, D, UPCAST), delay >= 0)
        weights *= weights
        if W > 0:
            weights += load_taps(conv + head * W, delay, W)
        acc += dot(weights, load_tile(v, R + key, rows + R, e, DV, UPCAST))
    if W > 0:
        for s in range(first_tap(first, begins, C, W), group_start, BS):
            key = s + tl.arange(0, BS)
            taps = load_taps(conv + head * W, row[:, None] - key[None, :], W)
            acc += dot(taps, load_tile(v, R + key, R + group_start, e, DV, UPCAST))
    store_tile(out + head * rows * DV, acc, row, rows, e, DV)


@triton.jit
def group_query_gradients(
    q, k, v, d_out, d_q, taps, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute d_q of BM rows of one query head, and `d_out · v` for the gradient of the conv.

    Args:
        taps: `[N, g, n C, W]`, is written: for each row the product of its d_out with the value 0 to W - 1
            tokens before it. Entries for tokens before the start of a packed sequence are not written.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    group_start = first // C * C
    k += state_head * rows * D
    v += state_head * (rows + R) * DV
    q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
    d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
    acc = tl.zeros((BM, BD), tl.float32)
    for s in range(group_start, first + BM, BS):
        key = s + tl.arange(0, BS)
        delay = row[:, None] - key[None, :]
        keys = load_tile(k, key, rows, d, D, UPCAST)
        d_weights = dot(d_out_tile, tl.trans(load_tile(v, R + key, rows + R, e, DV, UPCAST)))
        if W > 0:
            pointers = taps + head * rows * W + (row[:, None] * W + delay)
            tl.store(pointers, d_weights, mask=(delay >= 0) & (delay < W))
        acc += dot(2 * relu_scores(q_tile, keys, delay >= 0) * d_weights, keys)
    if W > 0:
        for s in range(first_tap(first, begins, C, W), group_start, BS):
            key = s + tl.arange(0, BS)
            delay = row[:, None] - key[None, :]
            d_weights = dot(d_out_tile, tl.trans(load_tile(v, R + key, R + group_start, e, DV, UPCAST)))
            pointers = taps + head * rows * W + (row[:, None] * W + delay)
            tl.store(pointers, d_weights, mask=(delay < W) & (key < group_start)[None, :])
    store_tile(d_q + head * rows * D, acc, row, rows, d, D)


@triton.jit
def answers(
    a, S, phi, factor, out, total, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute `a Sᵀ` for BM rows of one head, where S is the state before the rows' group.

    With a = d_out it is the gradient of φ(q). With a = v and the gradient of S, it is the gradient of φ(k).

    Args:
        a: `[N, g, R + n C, Dv]`. Its first R slots are skipped.
        S: `[N, n, F, Dv]`.
        factor: `[N, g]`, by which `out` is scaled, or None.
        out: `[N, g, n C, F]`, is written.
        phi: `[N, g, n C, F]`, the features φ(q), or None without a factor.
        total: `[N, g, n C]`, is written if there is a factor: `phi · a Sᵀ`, for the gradient of the factor.
        rows: n C.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, e = first + tl.arange(0, BM), tl.arange(0, BV)
    chunk = state_head * (rows // C) + first // C
    a_tile = load_tile(a + head * (rows + R) * DV, R + row, rows + R, e, DV, UPCAST)
    phi_products = tl.zeros((BM,), tl.float32)
    for first_f in range(0, F, BF):
        f = first_f + tl.arange(0, BF)
        d_phi = dot(a_tile, tl.trans(load_tile(S + chunk * F * DV, f, F, e, DV, UPCAST)))
        if factor is not None:
            phi_products += tl.sum(d_phi * load_tile(phi + head * rows * F, row, rows, f, F, UPCAST), 1)
            d_phi *= tl.load(factor + head).to(tl.float32)
        store_tile(out + head * rows * F, d_phi, row, rows, f, F)
    if factor is not None:
        tl.store(total + head * rows + row, phi_products)


@triton.jit
def group_slot_gradients(
    q, k, v, phi_k, conv, d_S, d_out, d_k, d_v, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute d_k and d_v of BS tokens of one group. The first programs compute d_v of the R slots before the
    first key.
    """
    state_head = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(1) - tl.cdiv(R, BS)) * BS
    key, d, e = first + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    key_row = tl.where(key >= 0, key, rows)  # a row outside k loads as zero
    slot = tl.where(key >= -R, R + key, R + rows)
    k_tile = load_tile(k + state_head * rows * D, key_row, rows, d, D, UPCAST)
    v_tile = load_tile(v + state_head * (rows + R) * DV, slot, rows + R, e, DV, UPCAST)
    acc_k = tl.zeros((BS, BD), tl.float32)
    acc_v = tl.zeros((BS, BV), tl.float32)
    group_end = tl.maximum(first + C, 0) // C * C
    for member in range(GROUP):
        head = state_head * GROUP + member
        for t in range(tl.maximum(first, 0) // BM * BM, group_end, BM):
            row = t + tl.arange(0, BM)
            delay = row[None, :] - key[:, None]
            q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
            d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
            score = relu_scores(k_tile, q_tile, delay >= 0)
            acc_k += dot(2 * score * dot(v_tile, tl.trans(d_out_tile)), q_tile)
            weights = score * score
            if W > 0:
                weights += load_taps(conv + head * W, delay, W)
            acc_v += dot(weights, d_out_tile)
        if W > 0:
            for t in range(group_end, tl.minimum(first + BS - 1 + W, rows), BM):
                row = t + tl.arange(0, BM)
                delay = row[None, :] - key[:, None]
                if begins is not None:
                    delay = tl.where(tl.load(begins + t // C) <= first, delay, -1)
                taps = load_taps(conv + head * W, delay, W)
                acc_v += dot(taps, load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST))
    if F > 0:
        chunk = state_head * (rows // C) + tl.maximum(first, 0) // C
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = load_tile(phi_k + state_head * rows * F, key_row, rows, f, F, UPCAST)
            acc_v += dot(phi, load_tile(d_S + chunk * F * DV, f, F, e, DV, UPCAST))
    store_tile(d_k + state_head * rows * D, acc_k, key_row, rows, d, D)
    store_tile(d_v + state_head * (rows + R) * DV, acc_v, slot, rows + R, e, DV)


def sizes(kernel: str, shape: Tiling, tokens: Groups) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel of this file, by name.

    Args:
        kernel: the kernel's name, for its tile sizes.
    """
    key_dim, value_dim = tokens.q.shape[-1], tokens.v.shape[-1]
    options = tiles(kernel, max(key_dim, value_dim), tokens.q)
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
        BF=min(options.features, padded(features)),
        BM=min(options.rows, shape.chunk),
        BS=min(options.slots, shape.chunk),
        UPCAST=INTERPRETED,
        num_warps=options.warps,
        num_stages=options.stages,
    )


def group_states(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the running sum S before each group, `[N, n, F, Dv]`, and after the first `folds` groups,
    `[N, F, Dv]`.

    Without a linear part the first result is None, and the second a copy of the given S. For packed sequences
    the second is None.
    """
    if tokens.phi_k is None:
        return None, None if tokens.S is None else tokens.S.clone()
    phi_k, v = tokens.phi_k[:, None], tokens.v[:, None]
    if packed is not None:
        return packed_states(phi_k, v, shape.chunk, packed)
    chunks = tokens.k.shape[1] // shape.chunk
    states, _, S, _ = chunk_states(phi_k, v, tokens.S, None, chunks, shape.chunk, folds=folds)
    return states, S


def forward(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the forward kernels of `forms.grouped`.

    Args:
        shape: the sizes C and R.
        folds: the number of groups to add to the returned S.
        tokens: the inputs.
        packed: the layout of packed sequences, or None.

    Returns:
        The outputs `[N, g, n C, Dv]`, and S after the first `folds` groups (None for packed sequences).
    """
    q, k, v, phi_q, _, factor, conv, _ = tokens
    heads, group, rows = q.shape[:3]
    states, S = group_states(shape, folds, tokens, packed)
    begins = None if packed is None else packed.begins
    out = q.new_empty(heads, group, rows, v.shape[-1])
    options = sizes("group_attend", shape, tokens)
    group_attend[(heads * group, rows // options["BM"])](
        q, k, v, phi_q, factor, conv, states, out, begins, rows, **options
    )
    return out, S


def backward(
    shape: Tiling, folds: int, tokens: Groups, d_out: Tensor, d_S: Tensor | None, packed: Packed | None = None
) -> Groups:
    """Run the backward kernels of `forms.grouped`, and return the gradients of all inputs.

    Args:
        folds: the number of groups in the S that the forward returned.
        tokens: the inputs.
        d_out: `[N, g, n C, Dv]`, the gradient of the outputs.
        d_S: `[N, F, Dv]`, the gradient of the returned S, or None for packed sequences.
        packed: the layout of packed sequences, or None.
    """
    q, k, v, phi_q, phi_k, factor, conv, _ = tokens
    heads, group, rows = q.shape[:3]
    grads = Groups._make(None if x is None else torch.empty_like(x) for x in tokens)
    begins, new_buffer = (None, q.new_empty) if packed is None else (packed.begins, q.new_zeros)
    taps = None if conv is None else new_buffer(*q.shape[:3], conv.shape[-1], dtype=torch.float32)
    options = sizes("group_query_gradients", shape, tokens)
    group_query_gradients[(heads * group, rows // options["BM"])](
        q, k, v, d_out, grads.q, taps, begins, rows, **options
    )
    if grads.conv is not None and taps is not None:
        grads.conv.copy_(taps.sum(2))

    d_states = None
    if phi_q is not None:
        assert factor is not None and grads.factor is not None
        options = sizes("answers", shape, tokens)
        states, _ = group_states(shape, folds, tokens, packed)
        total = q.new_empty(heads, group, rows, dtype=torch.float32)
        answers[(heads * group, rows // options["BM"])](
            d_out, states, phi_q, factor, grads.phi_q, total, rows, **options | dict(R=0)
        )
        grads.factor.copy_(total.sum(-1))
        by_row = factor.float()[..., None].expand(-1, -1, rows).contiguous()
        if packed is None:
            assert d_S is not None
            chunks = rows // shape.chunk
            d_states, _, d_S, _ = chunk_states(
                phi_q, d_out, d_S, None, chunks, shape.chunk, by_row, reverse=True, folds=folds
            )
        else:
            d_states, _ = packed_states(phi_q, d_out, shape.chunk, packed, factor=by_row, reverse=True)
        answers[(heads, rows // options["BM"])](
            v, d_states, None, None, grads.phi_k, None, rows, **options | dict(GROUP=1)
        )
    if packed is None:
        assert d_S is not None
        grads.S.copy_(d_S)
    options = sizes("group_slot_gradients", shape, tokens)
    slots = triton.cdiv(shape.recent, options["BS"]) + rows // options["BS"]
    group_slot_gradients[(heads, slots)](
        q, k, v, phi_k, conv, d_states, d_out, grads.k, grads.v, begins, rows, **options
    )
    return grads
