"""The backward kernels of the sliding form; positions are those of its forward.

With weights w_j of one normaliser, `d log w_j = w_j (d_out · v_j - mean)`, `mean = Σ_i w_i d_out · v_i`, for far ones
too. Rows and slots gather what is theirs, so nothing is added atomically.
"""

import torch
from torch import Tensor

from linearize_kernels.torch_forms.sliding import Shape, Tokens
from linearize_kernels.triton.common import band, dot, folded, folded_apart, put, summed_apart, tile
from linearize_kernels.triton.sliding_fwd import (
    delays,
    first_column,
    first_row,
    is_far,
    is_near,
    is_there,
    last_column,
    near_scores,
    older,
    own_sinks,
    products,
    scores,
    seen_from,
    sink_scores,
    sizes,
    some_far,
    vector,
    where_sinks_are,
)
from linearize_kernels.triton.tuning import Packed

try:  # a loader of remote code demands what is imported outside
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
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """What the other kernels need of BM rows of one query head.

    `mean` and `factor`, the far part's, are `[N, g, n C]`; `taps [N, g, n C, W]` is `d_out · v` by delay;
    `sink_weights` and `d_sinks`, their scores' gradients, are `[N, g, n C, sinks]`. Of packed sequences, `taps` beyond
    their begins are not written.
    """
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, max(SIZE, AT + 1), F, AHEAD)
    skip = seen_from(begins, skip, first, C)
    first_sink, start = own_sinks(begins, skip, start, lane, slots, R, SINKS)
    k += lane * slots * D
    v += lane * slots * DV
    own_q = tile(q + head * rows * D, row, rows, d, D, UP)
    own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
    log = tl.load(log_total + head * rows + row)
    average = tl.zeros((BM,), tl.float32)
    if F > 0:
        chunk = lane * (rows // C) + first // C
        phi_q += head * rows * F
        phi_k += lane * slots * F
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            answers = dot(own_d, tl.trans(tile(S + chunk * F * DV, f, F, e, DV, UP)))
            average += tl.sum(answers * tile(phi_q, row, rows, f, F, UP), 1)
        own_factor = tl.exp(tl.load(mix + head * rows + row).to(tl.float32) - log)
        average *= own_factor
        tl.store(factor + head * rows + row, own_factor)
    for s in range(first_column(first, begins, skip, C, R, max(SIZE, W - AT), F, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        keys = tile(k, slot, last, d, D, UP)
        weights = tl.exp(
            near_scores(own_q, keys, row, slot, skip, rows, scale, R, SIZE, AHEAD) - log[:, None]
        )
        delay = R + row[:, None] - slot[None, :]
        if F > 0:
            some, seen = some_far(first, s, R, SIZE, AHEAD, BM, BS), is_far(delay, SIZE, AHEAD)
            far = products(phi_q, row, rows, phi_k, slot, last, some, seen, F, BF, UP)
            weights += own_factor[:, None] * far
        d_weights = dot(own_d, tl.trans(tile(v, slot, last, e, DV, UP)))
        average += tl.sum(weights * d_weights, 1)
        if W > 0:
            tap = delay + AT
            own_taps = taps + head * rows * W + (row[:, None] * W + tap)
            tl.store(own_taps, d_weights, mask=(tap >= 0) & (tap < W))
    sink_weights += head * rows * SINKS + row * SINKS
    d_sinks += head * rows * SINKS + row * SINKS
    for sink in range(SINKS):
        score = sink_scores(own_q, vector(sink_k + (first_sink + sink) * D, d, D), start + row, sink, scale)
        weight = tl.exp(score - log)
        d_weight = tl.sum(own_d * vector(sink_v + (first_sink + sink) * DV, e, DV)[None, :], 1)
        average += weight * d_weight
        tl.store(sink_weights + sink, weight)
        tl.store(d_sinks + sink, d_weight)
    tl.store(mean + head * rows + row, average)


@triton.jit(do_not_specialize=("skip",))
def query_gradients(
    q, k, v, sink_k, log_total, d_out, mean, d_sinks, d_q, scale, skip, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """d_q of BM rows of one query head."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, 0, AHEAD)
    skip = seen_from(begins, skip, first, C)
    first_sink, _ = own_sinks(begins, skip, 0, lane, slots, R, SINKS)
    own_q = tile(q + head * rows * D, row, rows, d, D, UP)
    own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
    log = tl.load(log_total + head * rows + row)[:, None]
    average = tl.load(mean + head * rows + row)[:, None]
    acc = tl.zeros((BM, BD), tl.float32)
    for sink in range(SINKS):
        d_sink = tl.load(d_sinks + (head * rows + row) * SINKS + sink).to(tl.float32)
        acc += d_sink[:, None] * vector(sink_k + (first_sink + sink) * D, d, D)[None, :]
    for s in range(first_column(first, begins, skip, C, R, SIZE, 0, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        keys = tile(k + lane * slots * D, slot, last, d, D, UP)
        weights = tl.exp(near_scores(own_q, keys, row, slot, skip, rows, scale, R, SIZE, AHEAD) - log)
        d_weights = dot(own_d, tl.trans(tile(v + lane * slots * DV, slot, last, e, DV, UP))) - average
        acc += dot(weights * d_weights * scale, keys)
    put(d_q + head * rows * D, acc, row, rows, d, D)


@triton.jit
def query_feature_gradients(
    v, phi_q, phi_k, S, z, d_out, mean, factor, d_phi, d_mix, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """d_phi_q of BM rows of one query head, and d_mix, which is `φ_q · d_phi_q`."""
    head = tl.program_id(0).to(tl.int64)
    lane, first = head // GROUP, tl.program_id(1) * BM
    row, e = first + tl.arange(0, BM), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, F, AHEAD)
    if AHEAD == 0:
        last -= SIZE
    chunk = lane * (rows // C) + first // C
    v += lane * slots * DV
    own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
    average = tl.load(mean + head * rows + row)
    own_factor = tl.load(factor + head * rows + row)
    total = tl.zeros((BM,), tl.float32)
    for first_f in range(0, F, BF):
        f = first_f + tl.arange(0, BF)
        masses = tl.load(z + chunk * F + f, mask=f < F, other=0.0)
        acc = (
            dot(own_d, tl.trans(tile(S + chunk * F * DV, f, F, e, DV, UP)))
            - average[:, None] * masses[None, :]
        )
        begin = first_column(first, begins, seen_from(begins, 0, first, C), C, R, SIZE, F, 0)
        for s in range(begin, last, BS):
            slot = s + tl.arange(0, BS)
            seen = is_far(R + row[:, None] - slot[None, :], SIZE, AHEAD)
            d_weight = dot(own_d, tl.trans(tile(v, slot, last, e, DV, UP))) - average[:, None]
            acc += dot(tl.where(seen, d_weight, 0.0), tile(phi_k + lane * slots * F, slot, last, f, F, UP))
        acc *= own_factor[:, None]
        total += tl.sum(acc * tile(phi_q + head * rows * F, row, rows, f, F, UP), 1)
        put(d_phi + head * rows * F, acc, row, rows, f, F)
    tl.store(d_mix + head * rows + row, total)


@triton.jit(do_not_specialize=("skip",))
def slot_gradients(
    q, k, v, phi_q, phi_k, conv, d_S, log_total, d_out, mean, factor, d_k, d_v, scale, skip, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BS slots of one chunk, from the rows whose columns hold them and from what S brought later."""
    lane, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BS
    slot, d, e = first + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
    slots = rows + R + AHEAD
    own_k = tile(k + lane * slots * D, slot, slots, d, D, UP)
    own_v = tile(v + lane * slots * DV, slot, slots, e, DV, UP)
    acc_k = tl.zeros((BS, BD), tl.float32)
    acc_v = tl.zeros((BS, BV), tl.float32)
    last = (first // C + 1) * C
    if F == 0:
        last = first + BS - 1 + max(SIZE, W - AT) - R
    begin = first_row(first, C, R, max(SIZE, AT + 1), F, AHEAD) // BM * BM
    steps = tl.cdiv(tl.maximum(tl.minimum(last, rows) - begin, 0), BM)
    for step in range(0, GROUP * steps):
        head = lane * GROUP + step // steps
        t = begin + step % steps * BM
        row = t + tl.arange(0, BM)
        own_skip = seen_from(begins, skip, t, C)
        delay = delays(slot, row, begins, own_skip, R, SINKS)
        own_q = tile(q + head * rows * D, row, rows, d, D, UP)
        own_d = tile(d_out + head * rows * DV, row, rows, e, DV, UP)
        seen = is_near(delay, SIZE, AHEAD) & is_there(slot, own_skip, R + rows, AHEAD)[:, None]
        log = tl.load(log_total + head * rows + row)
        weight = tl.exp(scores(own_k, own_q, seen, scale) - log[None, :])
        d_weight = dot(own_v, tl.trans(own_d)) - tl.load(mean + head * rows + row)[None, :]
        acc_k += dot(weight * d_weight * scale, own_q)
        if W > 0:
            weight += band(conv + head * W, delay + AT, W)
        if F > 0:
            far = products(
                phi_k + lane * slots * F, slot, slots, phi_q + head * rows * F, row, rows,
                some_far(t, first, R, SIZE, AHEAD, BM, BS), is_far(delay, SIZE, AHEAD), F, BF, UP,
            )  # fmt: skip
            weight += tl.load(factor + head * rows + row)[None, :] * far
        acc_v += dot(weight, own_d)
    if F > 0:
        old = rows if AHEAD == 0 else slots  # the last R slots are in no S, unless rows see ahead
        chunk, own_slot = tl.minimum(first, old - 1) // C, slot
        if begins is not None:
            own_slot = tl.where(slot >= tl.load(begins + chunk), slot, old)
        chunk += lane * (old // C)
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = tile(phi_k + lane * slots * F, own_slot, old, f, F, UP)
            acc_v += dot(phi, tile(d_S + chunk * F * DV, f, F, e, DV, UP))
    put(d_k + lane * slots * D, acc_k, slot, slots, d, D)
    put(d_v + lane * slots * DV, acc_v, slot, slots, e, DV)


@triton.jit
def slot_feature_gradients(
    v, phi_q, d_S, d_z, d_out, mean, factor, d_phi, begins, rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """BF features' d_phi_k of BS slots of one chunk."""
    lane, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BS
    slot, f, e = first + tl.arange(0, BS), tl.program_id(2) * BF + tl.arange(0, BF), tl.arange(0, BV)
    slots = rows + R + AHEAD
    own_v = tile(v + lane * slots * DV, slot, slots, e, DV, UP)
    acc = tl.zeros((BS, BF), tl.float32)
    begin = first_row(first if AHEAD > 0 else first + SIZE, C, R, SIZE, F, AHEAD) // BM * BM
    for member in range(GROUP):
        head = lane * GROUP + member
        for t in range(begin, tl.minimum((first // C + 1) * C, rows), BM):
            row = t + tl.arange(0, BM)
            seen = is_far(delays(slot, row, begins, seen_from(begins, 0, t, C), R, SINKS), SIZE, AHEAD)
            d_weight = dot(own_v, tl.trans(tile(d_out + head * rows * DV, row, rows, e, DV, UP)))
            d_weight -= tl.load(mean + head * rows + row)[None, :]
            d_weight *= tl.load(factor + head * rows + row)[None, :]
            acc += dot(tl.where(seen, d_weight, 0.0), tile(phi_q + head * rows * F, row, rows, f, F, UP))
    old = rows if AHEAD == 0 else slots
    if first < old:
        chunk = lane * (old // C) + first // C
        later = dot(own_v, tl.trans(tile(d_S + chunk * F * DV, f, F, e, DV, UP)))
        later += tl.load(d_z + chunk * F + f, mask=f < F, other=0.0)[None, :]
        if begins is not None:
            later = tl.where((slot >= tl.load(begins + first // C))[:, None], later, 0.0)
        acc += later
    put(d_phi + lane * slots * F, acc, slot, slots, f, F)


def backward(
    shape: Shape, tokens: Tokens, log_total: Tensor, d_out: Tensor, d_S: Tensor | None, d_z: Tensor | None,
    packed: Packed | None = None,
) -> Tokens:  # fmt: skip
    """The gradients of `tokens`, from those of what `sliding` returns; log_total: as `forward` left it."""
    q, k, v, phi_q, phi_k, mix, conv, *_ = tokens
    lanes, group, rows = q.shape[:3]
    slots, chunks = k.shape[1], rows // shape.chunk
    sink_k, sink_v, begins = where_sinks_are(tokens, packed)
    states, masses, _, _ = older(shape, tokens, packed)
    grads = Tokens(*(None if x is None else torch.empty_like(x) for x in tokens))
    mean, factor = (torch.empty_like(log_total) for _ in range(2))
    room = log_total.new_empty if packed is None else log_total.new_zeros
    taps = None if conv is None else room(*q.shape[:3], conv.shape[-1])

    own = sizes("query_means", shape, tokens, packed)
    sink_weights, d_sinks = (mean.new_empty(lanes, group * rows, own["SINKS"]) for _ in range(2))
    query_means[(lanes * group, rows // own["BM"])](
        q, k, v, phi_q, phi_k, mix, states, sink_k, sink_v, log_total, d_out, mean, factor, taps, sink_weights,
        d_sinks, shape.scale, shape.start, shape.skip, begins, rows, **own,
    )  # fmt: skip
    d_sinks = (sink_weights * (d_sinks - mean.view(lanes, -1, 1)) * shape.scale).to(q.dtype)
    sink_weights = sink_weights.to(q.dtype)
    own = sizes("query_gradients", shape, tokens, packed)
    query_gradients[(lanes * group, rows // own["BM"])](
        q, k, v, sink_k, log_total, d_out, mean, d_sinks, grads.q, shape.scale, shape.skip, begins, rows, **own,
    )  # fmt: skip
    if conv is not None:
        grads.conv.copy_(taps.sum(2))

    d_states = d_masses = None
    if phi_q is not None:
        own = sizes("query_feature_gradients", shape, tokens, packed)
        query_feature_gradients[(lanes * group, rows // own["BM"])](
            v, phi_q, phi_k, states, masses, d_out, mean, factor, grads.phi_q, grads.mix, begins, rows, **own
        )
        part = dict(factor=factor, mean=mean)
        if packed is None:
            d_states, d_masses, d_S, d_z = folded(
                phi_q, d_out, d_S, d_z, chunks, shape.chunk, **part, reverse=True, empty=shape.around
            )
            if shape.ahead:
                before = phi_q, d_out, torch.zeros_like(d_S), torch.zeros_like(d_z), chunks, shape.chunk
                folded(*before, **part, onto=(d_states, d_masses), to=shape.around)
        else:
            own = dict(with_z=True, reverse=True)
            d_states, d_masses = folded_apart(phi_q, d_out, shape.chunk, packed, **part, **own)
        own = sizes("slot_feature_gradients", shape, tokens, packed)
        grid = (lanes, triton.cdiv(slots, own["BS"]), triton.cdiv(own["F"], own["BF"]))
        slot_feature_gradients[grid](
            v, phi_q, d_states, d_masses, d_out, mean, factor, grads.phi_k, begins, rows, **own
        )
    own = sizes("slot_gradients", shape, tokens, packed)
    slot_gradients[(lanes, triton.cdiv(slots, own["BS"]))](
        q, k, v, phi_q, phi_k, conv, d_states, log_total, d_out, mean, factor, grads.k, grads.v, shape.scale,
        shape.skip, begins, rows, **own,
    )  # fmt: skip
    if packed is None:
        grads.S.copy_(d_S)
        grads.z.copy_(d_z)
        torch.bmm(sink_weights.mT, d_out.flatten(1, 2), out=grads.sink_v)
        torch.bmm(d_sinks.mT, q.flatten(1, 2), out=grads.sink_k)
    elif packed.sinks:
        first = packed.begins[packed.segments[packed.firsts[:-1]]] - packed.sinks
        places = (first[:, None] + torch.arange(packed.sinks, device=first.device)).flatten()
        for grad, weights, x in ((grads.v, sink_weights, d_out), (grads.k, d_sinks, q)):
            own = summed_apart(weights.unflatten(1, (group, rows)), x, shape.chunk, packed)
            grad.index_add_(1, places, own.flatten(1, 2).to(grad.dtype))
    return grads
