"""The forward kernel of the sliding form, and the device functions that its backward kernels share.

A slot is the place of one token's key and value in the sequence of all slots, the timeline (see
`torch_forms.chunks`). A row is a query. The token of row t is in slot R + t, so slot s is `R + t - s` tokens
before row t. This number is called its delay. Each row sees the slots that its chunk reads, its columns. A
column is local if its delay is below `size`, otherwise far. With AHEAD > 0 there are also columns after a
row, with negative delays, and the rule applies to the absolute delay. The names in capitals are explained in
`common`; W is the conv's width, and SIZE the window's.

For packed sequences, `begins` has the first slot after the sinks of each chunk's sequence, otherwise it is
None. Rows of packed sequences never see ahead. The slots of earlier sequences are below `begins - SINKS`.
"""

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.sliding import LOW, Shape, Tokens
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

LOW_SCORE, TINY_TOTAL = tl.constexpr(LOW), tl.constexpr(TINY)


@triton.jit
def scores(a, b, seen, scale):
    """Compute the scaled scores `a bᵀ`, -inf where `seen` is False."""
    return tl.where(seen, dot(a, tl.trans(b)) * scale, float("-inf"))


@triton.jit
def is_local(delay, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """Return True where a key is inside the window: its delay (how many tokens it is before the query) is
    from 0 to SIZE - 1.

    With AHEAD > 0 (queries see later tokens), the delay may also be negative, down to -(SIZE - 1).
    """
    least = 0 if AHEAD == 0 else 1 - SIZE
    return (delay >= least) & (delay < SIZE)


@triton.jit
def is_far(delay, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """Return True where a key is outside the window: its delay (how many tokens it is before the query) is
    SIZE or more.

    With AHEAD > 0 (queries see later tokens), so is a key SIZE or more tokens after the query.
    """
    far = delay >= SIZE
    if AHEAD > 0:
        far = far | (delay <= -SIZE)
    return far


@triton.jit
def any_far(
    row, slot, R: tl.constexpr, SIZE: tl.constexpr, AHEAD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr
):
    """Return True if any of the BM queries from `row` on has any of the BS keys from `slot` on outside its
    window.
    """
    has_far = R + row + BM - slot > SIZE
    if AHEAD > 0:
        has_far = has_far | (slot + BS - R - row > SIZE)
    return has_far


@triton.jit
def holds_key(slot, skip, end, AHEAD: tl.constexpr):
    """Return True for each slot that holds a key which is neither missing nor a sink.

    Args:
        slot: indices in the sequence of keys.
        skip: the first index after the empty slots and the sinks.
        end: the end of the keys. It is checked only with AHEAD > 0, because otherwise no query reads past it.
    """
    present = slot >= skip
    if AHEAD > 0:
        present = present & (slot < end)
    return present


@triton.jit
def local_scores(
    q, k, row, slot, skip, rows, scale, R: tl.constexpr, SIZE: tl.constexpr, AHEAD: tl.constexpr
):
    """Compute the scores of a tile of queries and keys. They are -inf for keys outside the window."""
    local = is_local(R + row[:, None] - slot[None, :], SIZE, AHEAD)
    return scores(q, k, local & holds_key(slot, skip, R + rows, AHEAD)[None, :], scale)


@triton.jit
def delays(slot, row, begins, skip, R: tl.constexpr, SINKS: tl.constexpr):
    """Compute how many tokens before each query (row) of a chunk each key (slot) is, `[slots, rows]`.

    Keys of earlier packed sequences get -1, which is neither inside nor before the window.

    Args:
        begins: a table for packed sequences, or None for a single sequence.
        skip: the first slot of the rows' sequence after its sinks.
    """
    delay = R + row[None, :] - slot[:, None]
    if begins is not None:
        delay = tl.where((slot >= skip - SINKS)[:, None], delay, -1)
    return delay


@triton.jit
def first_key(begins, skip, row, C: tl.constexpr):
    """Return the index of the first key that is not a sink, in the sequence that query `row` belongs to.

    For packed sequences it is read from the table `begins`. Otherwise (None) it is `skip`.
    """
    if begins is not None:
        skip = tl.load(begins + row // C)
    return skip


@triton.jit
def sink_start(begins, skip, start, state_head, slots, R: tl.constexpr, SINKS: tl.constexpr):
    """Return where the sinks' keys begin in the tensor that holds them, and the position of query row 0 in
    its text.

    The tensor is k itself for packed sequences, whose sinks are their first keys. Otherwise (`begins` is
    None) it is sink_k, and the position is `start`.
    """
    index = state_head * SINKS
    if begins is not None:
        index = state_head * slots + skip - SINKS
        start = R + SINKS - skip
    return index, start


@triton.jit
def load_vector(x, column, WIDTH: tl.constexpr):
    """Load columns of a vector `[WIDTH]` as fp32, zero outside it."""
    return tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def sink_scores(q, key, position, sink, scale):
    """Compute the scores of one attention sink for a tile of query rows, -inf for rows before the sink.

    Args:
        q: `[rows, D]`.
        key: `[D]`, the sink's key.
        position: `[rows]`, the rows' positions.
        sink: the sink's index, which is also its position.
    """
    return tl.where(position >= sink, tl.sum(q.to(tl.float32) * key[None, :], 1) * scale, float("-inf"))


@triton.jit
def far_products(
    a, a_row, a_end, b, b_row, b_end, has_far, seen, F: tl.constexpr, BF: tl.constexpr, UPCAST: tl.constexpr
):
    """Compute the products of features `φ_a φ_bᵀ`, zero where `seen` is False.

    Args:
        a, b: features `[a_end, F]` and `[b_end, F]`, of which the rows `a_row` and `b_row` are used.
        has_far: False if `seen` is False everywhere. Then nothing is loaded.
        seen: True where a and b are a query and a key before its window.
    """
    out = tl.zeros(seen.shape, tl.float32)
    if has_far:
        for first in range(0, F, BF):
            f = first + tl.arange(0, BF)
            out += dot(
                load_tile(a, a_row, a_end, f, F, UPCAST), tl.trans(load_tile(b, b_row, b_end, f, F, UPCAST))
            )
    return tl.where(seen, out, 0.0)


@triton.jit
def first_column(
    row, begins, skip, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, SINKS: tl.constexpr
):  # fmt: skip
    """Return the index of the first key that a tile of queries reads directly. It reads older keys through
    the sum S.

    With a linear part (F > 0), it is the first key that the tile's chunk reads, R keys before the chunk.
    Without one, it is REACH - 1 tokens before the tile's first query. In a packed sequence it is never before
    the sequence.

    Args:
        row: the tile's first query.
        begins: a table for packed sequences, or None.
        skip: the index of the sequence's first key after its sinks.
        C: queries in a chunk.
        REACH: the size of the window, or of the conv if larger.
    """
    first = row // C * C
    if F == 0:
        first = tl.maximum(first, row + R - REACH + 1)
    if begins is not None:
        first = tl.maximum(first, skip - SINKS)
    return first


@triton.jit
def last_column(
    row, BM: tl.constexpr, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Return the end (exclusive) of the keys that the BM queries from `row` on read directly.

    If queries do not see later tokens (AHEAD is 0), it is the end of their own keys. Otherwise it is the end
    of the keys that their chunk reads, or without a linear part (F is 0) REACH - 1 keys after the last
    query's own.
    """
    last = row + BM + R
    if AHEAD > 0:
        end = row // C * C + R + C + AHEAD
        last = tl.minimum(end, last + REACH - 1) if F == 0 else end
    return last


@triton.jit
def first_row(
    slot, C: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, F: tl.constexpr, AHEAD: tl.constexpr
):
    """Return the first query that reads directly any key of a tile, which begins at index `slot` in one
    chunk.

    If queries do not see later tokens (AHEAD is 0), it is the query of the first key's token. Otherwise it is
    the first query of the first chunk that reads the key, or without a linear part (F is 0) the query REACH -
    1 before.
    """
    first = slot - R
    if AHEAD > 0:
        begin = slot // C * C - R - AHEAD
        first = tl.maximum(begin, first - REACH + 1) if F == 0 else begin
    return tl.maximum(first, 0)


def sizes(kernel: str, shape: Shape, tokens: Tokens, packed: Packed | None) -> dict[str, Any]:
    """Return the compile-time arguments of a kernel of the sliding form, by name.

    Args:
        kernel: the kernel's name, for its tile sizes.
    """
    options = tiles(kernel, max(tokens.q.shape[-1], tokens.v.shape[-1]), tokens.q)
    features = 0 if tokens.phi_q is None else tokens.phi_q.shape[-1]
    return dict(
        GROUP=tokens.q.shape[1],
        C=shape.chunk,
        R=shape.recent,
        AHEAD=shape.ahead,
        SIZE=shape.size,
        D=tokens.q.shape[-1],
        DV=tokens.v.shape[-1],
        F=features,
        W=0 if tokens.conv is None else tokens.conv.shape[-1],
        SINKS=tokens.sink_k.shape[1] if packed is None else packed.sinks,
        BD=padded(tokens.q.shape[-1]),
        BV=padded(tokens.v.shape[-1]),
        BF=min(options.features, padded(features)),
        BM=min(options.rows, shape.chunk),
        BS=min(options.slots, shape.chunk),
        UPCAST=INTERPRETED,
        num_warps=options.warps,
        num_stages=options.stages,
    )


def states_outside(
    shape: Shape, tokens: Tokens, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the sums S and z that each chunk reads, and those after the last chunk.

    A chunk reads its nearest keys directly, and the sums over all others.

    Returns:
        S `[N, n, F, Dv]` and z `[N, n, F]` for the n chunks, which are None without a linear part. Then S
        `[N, F, Dv]` and z `[N, F]` after the last chunk. These are None for packed sequences, and copies of
        the given ones without a linear part.
    """
    if tokens.phi_k is None:
        S, z = (None if x is None else x.clone() for x in (tokens.S, tokens.z))
        return None, None, S, z
    phi_k, v, chunks = tokens.phi_k[:, None], tokens.v[:, None], tokens.q.shape[2] // shape.chunk
    if packed is not None:
        return *packed_states(phi_k, v, shape.chunk, packed, packed.begins, with_z=True), None, None
    states, masses, S_after, z_after = chunk_states(phi_k, v, tokens.S, tokens.z, chunks, shape.chunk)
    if shape.ahead:
        zeros = torch.zeros_like(tokens.S), torch.zeros_like(tokens.z)
        later = phi_k, v, *zeros, chunks, shape.chunk
        chunk_states(*later, reverse=True, onto=(states, masses), start=shape.around)
    return states, masses, S_after, z_after


def sink_tensors(tokens: Tokens, packed: Packed | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors that hold the sinks' keys and values, and a table of where packed sequences begin.

    The table `[n]` has, for each chunk, the index of its sequence's first key after the sinks. It is None
    without packing. The tensors are sink_k and sink_v, or k and v for packed sequences, whose sinks are their
    first keys.
    """
    return (tokens.sink_k, tokens.sink_v, None) if packed is None else (tokens.k, tokens.v, packed.begins)


@triton.jit(do_not_specialize=("start", "skip"))
def attend(
    q, k, v, phi_q, phi_k, mix, conv, S, z, sink_k, sink_v, out, log_total, scale, start, skip, begins,
    rows,
    GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, AHEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of BM query rows of one query head, and the logarithm of their normaliser.

    Args:
        S, z: `[N, n, F, Dv]` and `[N, n, F]`, for each chunk the sums over the tokens that it reads through
            the state.
        out: `[N, g, n C, Dv]`, is written.
        log_total: `[N, g, n C]`, is written: the logarithm of each row's normaliser.
        start: the position of row 0.
        skip: the number of keys at the head that are empty or sinks. Packed sequences use `begins` instead.
        begins: `[n]`, for each chunk the index of its sequence's first key after the sinks, or None.
        rows: n C.
    """
    head = tl.program_id(0).to(tl.int64)
    state_head, first = head // GROUP, tl.program_id(1) * BM
    row, d, e = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    slots, last = rows + R + AHEAD, last_column(first, BM, C, R, SIZE, F, AHEAD)
    skip = first_key(begins, skip, first, C)
    first_sink, start = sink_start(begins, skip, start, state_head, slots, R, SINKS)
    k += state_head * slots * D
    v += state_head * slots * DV
    q_tile = load_tile(q + head * rows * D, row, rows, d, D, UPCAST)
    running_max = tl.full((BM,), LOW_SCORE, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    if F > 0:
        mix_tile = tl.load(mix + head * rows + row).to(tl.float32)
        running_max = tl.maximum(mix_tile, running_max)
    for sink in range(SINKS):
        score = sink_scores(
            q_tile, load_vector(sink_k + (first_sink + sink) * D, d, D), start + row, sink, scale
        )
        new_max = tl.maximum(running_max, score)
        rescale = tl.exp(running_max - new_max)
        weight = tl.exp(score - new_max)
        running_max = new_max
        total = total * rescale + weight
        value = load_vector(sink_v + (first_sink + sink) * DV, e, DV)
        acc = acc * rescale[:, None] + weight[:, None] * value[None, :]
    if F > 0:
        chunk = state_head * (rows // C) + first // C
        phi_q += head * rows * F
        phi_k += state_head * slots * F
        factor = tl.exp(mix_tile - running_max)[:, None]
        for first_f in range(0, F, BF):
            f = first_f + tl.arange(0, BF)
            phi = load_tile(phi_q, row, rows, f, F, UPCAST) * factor
            acc += dot(phi, load_tile(S + chunk * F * DV, f, F, e, DV, UPCAST))
            total += tl.sum(phi * tl.load(z + chunk * F + f, mask=f < F, other=0.0)[None, :], 1)
    for s in range(first_column(first, begins, skip, C, R, SIZE, F, SINKS), last, BS):
        slot = s + tl.arange(0, BS)
        local = local_scores(
            q_tile, load_tile(k, slot, last, d, D, UPCAST), row, slot, skip, rows, scale, R, SIZE, AHEAD
        )
        new_max = tl.maximum(running_max, tl.max(local, 1))
        rescale = tl.exp(running_max - new_max)
        weights = tl.exp(local - new_max[:, None])
        running_max = new_max
        if F > 0:
            seen = is_far(R + row[:, None] - slot[None, :], SIZE, AHEAD)
            has_far = any_far(first, s, R, SIZE, AHEAD, BM, BS)
            far = far_products(phi_q, row, rows, phi_k, slot, last, has_far, seen, F, BF, UPCAST)
            weights += tl.exp(mix_tile - running_max)[:, None] * far
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + dot(weights, load_tile(v, slot, last, e, DV, UPCAST))
    total = tl.maximum(total, TINY_TOTAL)
    acc /= total[:, None]
    if W > 0:
        AT: tl.constexpr = 0 if AHEAD == 0 else W // 2  # the tap of a row's own slot
        last = last_column(first, BM, C, R, AT + 1, 0, AHEAD)
        for s in range(first_column(first, begins, skip, C, R, W - AT, 0, SINKS), last, BS):
            slot = s + tl.arange(0, BS)
            taps = load_taps(conv + head * W, R + row[:, None] - slot[None, :] + AT, W)
            acc += dot(taps, load_tile(v, slot, last, e, DV, UPCAST))
    store_tile(out + head * rows * DV, acc, row, rows, e, DV)
    tl.store(log_total + head * rows + row, running_max + tl.log(total))


def forward(
    shape: Shape, tokens: Tokens, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Run the forward kernels of `forms.sliding`.

    Returns:
        The outputs `[N, g, n C, Dv]`, S `[N, F, Dv]` and z `[N, F]` after all tokens (None for packed
        sequences), and the logarithms of the rows' normalisers, `[N, g, n C]`, which the backward needs.
    """
    q = tokens.q
    heads, group, rows = q.shape[:3]
    states, masses, S, z = states_outside(shape, tokens, packed)
    sink_k, sink_v, begins = sink_tensors(tokens, packed)
    out = q.new_empty(heads, group, rows, tokens.v.shape[-1])
    log_total = q.new_empty(heads, group, rows, dtype=torch.float32)
    options = sizes("attend", shape, tokens, packed)
    attend[(heads * group, rows // options["BM"])](
        q, tokens.k, tokens.v, tokens.phi_q, tokens.phi_k, tokens.mix, tokens.conv, states, masses, sink_k, sink_v,
        out, log_total, shape.scale, shape.start, shape.skip, begins, rows, **options,
    )  # fmt: skip
    return out, S, z, log_total
