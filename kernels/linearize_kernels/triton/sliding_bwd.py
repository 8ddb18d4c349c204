"""The backward kernels of the sliding form. `sliding_fwd` explains slots, rows, columns and delays.

Let w_j be the weights under one normaliser, local and far. Then `d log w_j = w_j (d_out · v_j - mean)` with
`mean = Σ_i w_i d_out · v_i`. Every program sums the gradients of its own rows or slots, so no kernel adds
atomically.
"""

import torch
from torch import Tensor

from linearize_kernels.torch_forms.sliding import Shape, Tokens
from linearize_kernels.triton.common import (
    chunk_states,
    dot,
    load_taps,
    load_tile,
    packed_states,
    packed_sums,
    store_tile,
)
from linearize_kernels.triton.sliding_fwd import (
    any_far,
    delays,
    far_products,
    first_column,
    first_key,
    first_row,
    holds_key,
    is_far,
    is_local,
    last_column,
    load_vector,
    local_scores,
    scores,
    sink_scores,
    sink_start,
    sink_tensors,
    sizes,
    states_outside,
)
from linearize_kernels.triton.tuning import Packed

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit(do_not_specialize=("start", "skip"))
def query_means(
    q, k, v, phi_q, phi_k, mix, S, sink_k, sink_v, log_total, d_out, mean, factor, taps, sink_weights, d_sinks,
    scale, start, skip, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the per-row terms that the other backward kernels read, for BM query rows of one query head.

    With the weights w_i of a row and the gradient d_out of its output, the row's mean is
    `Σ_i w_i d_out · v_i`.

    Args:
        mean: `[N, g, n C]`, is written: the mean of each row.
        factor: `[N, g, n C]`, is written: `exp(mix)` divided by the row's normaliser.
        taps: `[N, g, n C, W]`, is written: `d_out · v` for the token that each weight of the conv reads. Not
            written for tokens before a packed sequence.
        sink_weights, d_sinks: `[N, g, n C, sinks]`, are written: the weights of the sinks, and `d_out · v` of
            each.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, max(SIZE, AT + 1), F, AHEAD)
    skip = first_key(begins, skip, first, C)
    first_sink, start = sink_start(begins, skip, start, state_head, slots, R, SINKS)
    k += state_head * slots * D
    v += state_head * slots * DV
    q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
    d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
    log = tl.load(log_total + head * rows + row)
    average = tl.zeros((BM,), tl.float32)
    if F > 0:
        chunk = state_head * (rows // C) + first // C
        phi_q += head * rows * F
        phi_k += state_head * slots * F
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            d_phi = dot(d_out_tile, tl.trans(load_tile(S + chunk * F * DV, f, F, e, DV, UPCAST)))
            average += tl.sum(d_phi * load_tile(phi_q, row, rows, f, F, UPCAST), 1)
        factor_tile = tl.exp(tl.load(mix + head * rows + row).to(tl.float32) - log)
        average *= factor_tile
        tl.store(factor + head * rows + row, factor_tile)
    for s in range(first_column(first, begins, skip, C, R, max(SIZE, W - AT), F, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        keys = load_tile(k, slot, last, d, D, UPCAST)
        weights = tl.exp(
            local_scores(q_tile, keys, row, slot, skip, rows, scale, R, SIZE, AHEAD) - log[:, None]
        )
        delay = R + row[:, None] - slot[None, :]
        if F > 0:
            has_far, seen = any_far(first, s, R, SIZE, AHEAD, BM, BS), is_far(delay, SIZE, AHEAD)
            far = far_products(phi_q, row, rows, phi_k, slot, last, has_far, seen, F, BF, UPCAST)
            weights += factor_tile[:, None] * far
        d_weights = dot(d_out_tile, tl.trans(load_tile(v, slot, last, e, DV, UPCAST)))
        average += tl.sum(weights * d_weights, 1)
        if W > 0:
            tap = delay + AT
            tap_pointers = taps + head * rows * W + (row[:, None] * W + tap)
            tl.store(tap_pointers, d_weights, mask=(tap >= 0) & (tap < W))
    sink_weights += head * rows * SINKS + row * SINKS
    d_sinks += head * rows * SINKS + row * SINKS
    for sink in range(SINKS):
        score = sink_scores(
            q_tile, load_vector(sink_k + (first_sink + sink) * D, d, D), start + row, sink, scale
        )
        weight = tl.exp(score - log)
        d_weight = tl.sum(d_out_tile * load_vector(sink_v + (first_sink + sink) * DV, e, DV)[None, :], 1)
        average += weight * d_weight
        tl.store(sink_weights + sink, weight)
        tl.store(d_sinks + sink, d_weight)
    tl.store(mean + head * rows + row, average)


@triton.jit(do_not_specialize=("skip",))
def query_gradients(
    q, k, v, sink_k, log_total, d_out, mean, d_sinks, d_q, scale, skip, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute d_q of BM rows of one query head.

    Args:
        mean: `[N, g, n C]`, the per-row mean that `query_means` computes.
        d_sinks: `[N, g, n C, sinks]`, the gradients of the sinks' scores, times the scale.
        d_q: `[N, g, n C, D]`, is written.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, 0, AHEAD)
    skip = first_key(begins, skip, first, C)
    first_sink, _ = sink_start(begins, skip, 0, state_head, slots, R, SINKS)
    q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
    d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
    log = tl.load(log_total + head * rows + row)[:, None]
    average = tl.load(mean + head * rows + row)[:, None]
    acc = tl.zeros((BM, BD), tl.float32)
    for sink in range(SINKS):
        d_sink = tl.load(d_sinks + (head * rows + row) * SINKS + sink).to(tl.float32)
        acc += d_sink[:, None] * load_vector(sink_k + (first_sink + sink) * D, d, D)[None, :]
    for s in range(first_column(first, begins, skip, C, R, SIZE, 0, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        keys = load_tile(k + state_head * slots * D, slot, last, d, D, UPCAST)
        weights = tl.exp(local_scores(q_tile, keys, row, slot, skip, rows, scale, R, SIZE, AHEAD) - log)
        d_weights = (
            dot(d_out_tile, tl.trans(load_tile(v + state_head * slots * DV, slot, last, e, DV, UPCAST)))
            - average
        )
        acc += dot(weights * d_weights * scale, keys)
    store_tile(d_q + head * rows * D, acc, row, rows, d, D)


@triton.jit
def query_feature_gradients(
    v, phi_q, phi_k, S, z, d_out, mean, factor, d_phi, d_mix, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the features φ(q), and of `mix` (the logit of the linear part), for BM rows of
    one query head.

    Args:
        S, z: `[N, n, F, Dv]` and `[N, n, F]`, for each chunk the sums over the tokens that it reads through
            the state.
        mean, factor: `[N, g, n C]`, the per-row terms that `query_means` computes.
        d_phi: `[N, g, n C, F]`, is written.
        d_mix: `[N, g, n C]`, is written. It is `φ(q) · d_phi`.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, e = first + tl.arange(0, BM), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, F, AHEAD)
    if AHEAD == 0:
        last -= SIZE
    chunk = state_head * (rows // C) + first // C
    v += state_head * slots * DV
    d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
    average = tl.load(mean + head * rows + row)
    factor_tile = tl.load(factor + head * rows + row)
    total = tl.zeros((BM,), tl.float32)
    for first_f in range(0, F, BF):
        f = first_f + tl.arange(0, BF)
        masses = tl.load(z + chunk * F + f, mask=f < F, other=0.0)
        acc = (
            dot(d_out_tile, tl.trans(load_tile(S + chunk * F * DV, f, F, e, DV, UPCAST)))
            - average[:, None] * masses[None, :]
        )
        begin = first_column(first, begins, first_key(begins, 0, first, C), C, R, SIZE, F, 0)
        for s in range(begin, last, BS):
            slot = s + tl.arange(0, BS)
            seen = is_far(R + row[:, None] - slot[None, :], SIZE, AHEAD)
            d_weight = dot(d_out_tile, tl.trans(load_tile(v, slot, last, e, DV, UPCAST))) - average[:, None]
            acc += dot(
                tl.where(seen, d_weight, 0.0),
                load_tile(phi_k + state_head * slots * F, slot, last, f, F, UPCAST),
            )
        acc *= factor_tile[:, None]
        total += tl.sum(acc * load_tile(phi_q + head * rows * F, row, rows, f, F, UPCAST), 1)
        store_tile(d_phi + head * rows * F, acc, row, rows, f, F)
    tl.store(d_mix + head * rows + row, total)


@triton.jit(do_not_specialize=("skip",))
def slot_gradients(
    q, k, v, phi_q, phi_k, conv, d_S, log_total, d_out, mean, factor, d_k, d_v, scale, skip, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute d_k and d_v of BS slots (keys and values) of one chunk.

    Query rows that read the keys directly contribute directly. Rows of other chunks read them through S, and
    contribute through `d_S`.

    Args:
        d_S: `[N, chunks, F, Dv]`, for each chunk of slots the gradient of S that its tokens get.
        mean, factor: `[N, g, n C]`, the per-row terms that `query_means` computes.
        d_k, d_v: the gradients of k and v, are written.
    """
    state_head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BS
    slot, d, e = first + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
    slots = rows + R + AHEAD
    k_tile = load_tile(k + state_head * slots * D, slot, slots, d, D, UPCAST)
    v_tile = load_tile(v + state_head * slots * DV, slot, slots, e, DV, UPCAST)
    acc_k = tl.zeros((BS, BD), tl.float32)
    acc_v = tl.zeros((BS, BV), tl.float32)
    last = (first // C + 1) * C
    if F == 0:
        last = first + BS - 1 + max(SIZE, W - AT) - R
    begin = first_row(first, C, R, max(SIZE, AT + 1), F, AHEAD) // BM * BM
    steps = tl.cdiv(tl.maximum(tl.minimum(last, rows) - begin, 0), BM)
    for step in range(0, GROUP * steps):
        head = state_head * GROUP + step // steps
        t = begin + step % steps * BM
        row = t + tl.arange(0, BM)
        first_slot = first_key(begins, skip, t, C)
        delay = delays(slot, row, begins, first_slot, R, SINKS)
        q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
        d_out_tile = load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)
        seen = is_local(delay, SIZE, AHEAD) & holds_key(slot, first_slot, R + rows, AHEAD)[:, None]
        log = tl.load(log_total + head * rows + row)
        weight = tl.exp(scores(k_tile, q_tile, seen, scale) - log[None, :])
        d_weight = dot(v_tile, tl.trans(d_out_tile)) - tl.load(mean + head * rows + row)[None, :]
        acc_k += dot(weight * d_weight * scale, q_tile)
        if W > 0:
            weight += load_taps(conv + head * W, delay + AT, W)
        if F > 0:
            far = far_products(
                phi_k + state_head * slots * F, slot, slots, phi_q + head * rows * F, row, rows,
                any_far(t, first, R, SIZE, AHEAD, BM, BS), is_far(delay, SIZE, AHEAD), F, BF, UPCAST,
            )  # fmt: skip
            weight += tl.load(factor + head * rows + row)[None, :] * far
        acc_v += dot(weight, d_out_tile)
    if F > 0:
        old = rows if AHEAD == 0 else slots  # without slots ahead, no S includes the last R slots
        chunk, state_slot = tl.minimum(first, old - 1) // C, slot
        if begins is not None:
            state_slot = tl.where(slot >= tl.load(begins + chunk), slot, old)
        chunk += state_head * (old // C)
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = load_tile(phi_k + state_head * slots * F, state_slot, old, f, F, UPCAST)
            acc_v += dot(phi, load_tile(d_S + chunk * F * DV, f, F, e, DV, UPCAST))
    store_tile(d_k + state_head * slots * D, acc_k, slot, slots, d, D)
    store_tile(d_v + state_head * slots * DV, acc_v, slot, slots, e, DV)


@triton.jit
def slot_feature_gradients(
    v, phi_q, d_S, d_z, d_out, mean, factor, d_phi, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of φ(k) for BS slots (keys) of one chunk and BF features.

    Args:
        d_S, d_z: `[N, chunks, F, Dv]` and `[N, chunks, F]`, for each chunk of slots the gradients of S and z
            that its tokens get.
        mean, factor: `[N, g, n C]`, the per-row terms that `query_means` computes.
        d_phi: the gradient of phi_k, is written.
    """
    state_head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BS
    slot, f, e = first + tl.arange(0, BS), tl.program_id(2) * BF + tl.arange(0, BF), tl.arange(0, BV)
    slots = rows + R + AHEAD
    v_tile = load_tile(v + state_head * slots * DV, slot, slots, e, DV, UPCAST)
    acc = tl.zeros((BS, BF), tl.float32)
    begin = first_row(first if AHEAD > 0 else first + SIZE, C, R, SIZE, F, AHEAD) // BM * BM
    for member in range(GROUP):
        head = state_head * GROUP + member
        for t in range(begin, tl.minimum((first // C + 1) * C, rows), BM):
            row = t + tl.arange(0, BM)
            seen = is_far(delays(slot, row, begins, first_key(begins, 0, t, C), R, SINKS), SIZE, AHEAD)
            d_weight = dot(v_tile, tl.trans(load_tile(d_out + head * rows * DV, row, rows, e, DV, UPCAST)))
            d_weight -= tl.load(mean + head * rows + row)[None, :]
            d_weight *= tl.load(factor + head * rows + row)[None, :]
            acc += dot(
                tl.where(seen, d_weight, 0.0), load_tile(phi_q + head * rows * F, row, rows, f, F, UPCAST)
            )
    old = rows if AHEAD == 0 else slots
    if first < old:
        chunk = state_head * (old // C) + first // C
        later = dot(v_tile, tl.trans(load_tile(d_S + chunk * F * DV, f, F, e, DV, UPCAST)))
        later += tl.load(d_z + chunk * F + f, mask=f < F, other=0.0)[None, :]
        if begins is not None:
            later = tl.where((slot >= tl.load(begins + first // C))[:, None], later, 0.0)
        acc += later
    store_tile(d_phi + state_head * slots * F, acc, slot, slots, f, F)


def backward(
    shape: Shape, tokens: Tokens, log_total: Tensor, d_out: Tensor, d_S: Tensor | None, d_z: Tensor | None,
    packed: Packed | None = None,
) -> Tokens:  # fmt: skip
    """Run the backward kernels of `forms.sliding`, and return the gradients of all inputs.

    Args:
        tokens: the inputs.
        log_total: `[N, g, n C]`, the logarithms of the rows' normalisers, from `sliding_fwd.forward`.
        d_out: `[N, g, n C, Dv]`, the gradient of the outputs.
        d_S, d_z: the gradients of the returned S `[N, F, Dv]` and z `[N, F]`, or None for packed sequences.
        packed: the layout of packed sequences, or None.
    """
    q, k, v, phi_q, phi_k, mix, conv, *_ = tokens
    heads, group, rows = q.shape[:3]
    slots, chunks = k.shape[1], rows // shape.chunk
    sink_k, sink_v, begins = sink_tensors(tokens, packed)
    states, masses, _, _ = states_outside(shape, tokens, packed)
    grads = Tokens._make(None if x is None else torch.empty_like(x) for x in tokens)
    mean, factor = (torch.empty_like(log_total) for _ in range(2))
    new_buffer = log_total.new_empty if packed is None else log_total.new_zeros
    taps = None if conv is None else new_buffer(*q.shape[:3], conv.shape[-1])

    options = sizes("query_means", shape, tokens, packed)
    sink_weights, d_sinks = (mean.new_empty(heads, group * rows, options["SINKS"]) for _ in range(2))
    query_means[(heads * group, rows // options["BM"])](
        q, k, v, phi_q, phi_k, mix, states, sink_k, sink_v, log_total, d_out, mean, factor, taps, sink_weights,
        d_sinks, shape.scale, shape.start, shape.skip, begins, rows, **options,
    )  # fmt: skip
    d_sinks = (sink_weights * (d_sinks - mean.view(heads, -1, 1)) * shape.scale).to(q.dtype)
    sink_weights = sink_weights.to(q.dtype)
    options = sizes("query_gradients", shape, tokens, packed)
    query_gradients[(heads * group, rows // options["BM"])](
        q, k, v, sink_k, log_total, d_out, mean, d_sinks, grads.q, shape.scale, shape.skip, begins, rows, **options,
    )  # fmt: skip
    if grads.conv is not None and taps is not None:
        grads.conv.copy_(taps.sum(2))

    d_states = d_masses = None
    if phi_q is not None:
        options = sizes("query_feature_gradients", shape, tokens, packed)
        query_feature_gradients[(heads * group, rows // options["BM"])](
            v,
            phi_q,
            phi_k,
            states,
            masses,
            d_out,
            mean,
            factor,
            grads.phi_q,
            grads.mix,
            begins,
            rows,
            **options,
        )
        if packed is None:
            assert d_S is not None
            d_states, d_masses, d_S, d_z = chunk_states(
                phi_q, d_out, d_S, d_z, chunks, shape.chunk, factor, mean, reverse=True, empty=shape.around
            )
            if shape.ahead:
                zeros = torch.zeros_like(tokens.S), torch.zeros_like(tokens.z)
                earlier = phi_q, d_out, *zeros, chunks, shape.chunk, factor, mean
                chunk_states(*earlier, onto=(d_states, d_masses), to=shape.around)
        else:
            d_states, d_masses = packed_states(
                phi_q, d_out, shape.chunk, packed, with_z=True, factor=factor, mean=mean, reverse=True
            )
        options = sizes("slot_feature_gradients", shape, tokens, packed)
        grid = (heads, triton.cdiv(slots, options["BS"]), triton.cdiv(options["F"], options["BF"]))
        slot_feature_gradients[grid](
            v, phi_q, d_states, d_masses, d_out, mean, factor, grads.phi_k, begins, rows, **options
        )
    options = sizes("slot_gradients", shape, tokens, packed)
    slot_gradients[(heads, triton.cdiv(slots, options["BS"]))](
        q, k, v, phi_q, phi_k, conv, d_states, log_total, d_out, mean, factor, grads.k, grads.v, shape.scale,
        shape.skip, begins, rows, **options,
    )  # fmt: skip
    if packed is None:
        assert d_S is not None and d_z is not None
        grads.S.copy_(d_S)
        grads.z.copy_(d_z)
        torch.bmm(sink_weights.mT, d_out.flatten(1, 2), out=grads.sink_v)
        torch.bmm(d_sinks.mT, q.flatten(1, 2), out=grads.sink_k)
    elif packed.sinks:
        first = packed.begins[packed.segments[packed.firsts[:-1]]] - packed.sinks
        sink_slots = (first[:, None] + torch.arange(packed.sinks, device=first.device)).flatten()
        for grad, weights, x in ((grads.v, sink_weights, d_out), (grads.k, d_sinks, q)):
            d_sequences = packed_sums(weights.unflatten(1, (group, rows)), x, shape.chunk, packed)
            grad.index_add_(1, sink_slots, d_sequences.flatten(1, 2).to(grad.dtype))
    return grads
