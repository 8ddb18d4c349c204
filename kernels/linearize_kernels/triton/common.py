"""Device functions and launchers that the Triton kernels of both chunked forms share.

The kernels `fold` and `carry` compute S and z before each chunk. In shapes, N is batch x heads of S, and g is
the number of query heads that read one head of S. In the kernels, `state_head` is an index into N, and `head`
an index into the N g query heads. Names in capitals are compile-time constants: GROUP is g, C the tokens in a
chunk, D and DV the sizes of a head's keys and values, F the number of features. BD, BV, BF, BM and BS are the
sizes of a program's tile in dimensions of keys, dimensions of values, features, rows and slots. UPCAST is
True in Triton's interpreter.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from linearize_kernels.triton.tuning import SEGMENT, Packed, padded, tiles

try:  # transformers' loader of remote code requires every package that is imported outside a `try`
    import triton
    import triton.language as tl
except ImportError:
    raise

WIDTH = 512  # elements of S that a program of `carry` sums


@triton.jit
def load_tile(x, row, end, column, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Load a tile (some rows and columns) of a matrix `[end, WIDTH]`. Entries outside the matrix are zero.

    With UPCAST, which the interpreter needs, the tile is converted to fp32.
    """
    mask = (row < end)[:, None] & (column < WIDTH)[None, :]
    out = tl.load(x + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    if UPCAST:
        out = out.to(tl.float32)
    return out


@triton.jit
def store_tile(x, value, row, end, column, WIDTH: tl.constexpr):
    """Store a tile (some rows and columns) of a matrix `[end, WIDTH]`. Entries outside the matrix are not
    stored.
    """
    mask = (row < end)[:, None] & (column < WIDTH)[None, :]
    tl.store(x + row[:, None] * WIDTH + column[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """Multiply two tiles in the dtype of b, with the sum in fp32."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def load_taps(conv, delay, W: tl.constexpr):
    """Load the conv's weights of one head for a tile of distances in tokens. Distances outside 0 to W - 1
    give zero.
    """
    return tl.load(conv + delay, mask=(delay >= 0) & (delay < W), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("cut",))
def fold(
    a, b, factor, mean, S, z, states, masses, length, chunks, places, cut, segments, begins,
    GROUP: tl.constexpr, C: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, LEAD: tl.constexpr,
    SEGMENT: tl.constexpr, REVERSE: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum `aᵀ b` over the chunks of one segment, in fp32. In the forward a is φ(k) and b is v, so this
    computes S.

    z is the sum of a. The kernel runs twice. The first pass has no `states`: it writes the sum of segment i
    to index i + 1 of S and z. Between the passes the host turns these into the sums before each segment. The
    second pass reads the sum before segment i at index i. It writes the sum before each chunk of the segment
    to `states` and `masses`.

    Args:
        a, b: `[N, g, length, F]` and `[N, g, LEAD + length, Dv]`. The first LEAD rows of b are skipped.
        factor: `[N, g, length]`, by which the rows of a are multiplied, or None.
        mean: `[N, g, length]` or None. With it, z is the sum of `-mean factor a` instead of a. The backward
            needs that.
        S, z: `[N, segments + 1, F, Dv]` and `[N, segments + 1, F]`. z may be None.
        states, masses: S and z before each chunk, `[N, places, F, Dv]` and `[N, places, F]`. None in the
            first pass.
        length: the number of rows of a.
        chunks: the number of chunks.
        places: the number of entries of `states`, at least the number of chunks.
        cut: number of chunks after which a segment ends, even if it has fewer than SEGMENT chunks.
        segments: for packed sequences `[s + 1]`, the first chunk of each segment and the end, else None. S
            and z then have s segments, and segment i has index i in both passes.
        begins: `[chunks]`, the first row of a that is summed in each chunk (earlier ones are skipped), or
            None.
        REVERSE: sum from the last chunk to the first, so that "before" above means "after".
        FROM, TO: the first chunk to read in a and b, and its index in `states`. If either is above 0, the
            sums are added to the values in `states`.
    """
    state_head, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.program_id(2) // tl.cdiv(DV, BV) * BF + tl.arange(0, BF)
    first_e = tl.program_id(2) % tl.cdiv(DV, BV) * BV
    e = first_e + tl.arange(0, BV)
    index = state_head * tl.num_programs(1) + segment
    if segments is None:
        index += state_head
        uncut = segment * SEGMENT
        begin = tl.where(uncut < cut, uncut, cut + (segment - tl.cdiv(cut, SEGMENT)) * SEGMENT)
        end = tl.minimum(begin + SEGMENT, tl.where(uncut < cut, cut, chunks))
        last = chunks - 1 - begin
    else:
        begin, end = tl.load(segments + segment), tl.load(segments + segment + 1)
        last = end - 1
    total = tl.zeros((BF, BV), tl.float32)
    mass = tl.zeros((BF,), tl.float32)
    if states is None and segments is None:
        index += 1
    S += index * F * DV
    if z is not None:
        z += index * F
    if states is not None:
        total += load_tile(S, f, F, e, DV, UPCAST)
        if z is not None:
            mass += tl.load(z + f, mask=f < F, other=0.0)
    for step in range(0, end - begin):
        chunk = last - step if REVERSE else begin + step
        if states is not None:
            state_index = state_head * places + TO + chunk
            chunk_S, chunk_z = total, mass
            if FROM + TO > 0:
                chunk_S += load_tile(states + state_index * F * DV, f, F, e, DV, UPCAST)
            store_tile(states + state_index * F * DV, chunk_S, f, F, e, DV)
            if z is not None and first_e == 0:
                if FROM + TO > 0:
                    chunk_z += tl.load(masses + state_index * F + f, mask=f < F, other=0.0)
                tl.store(masses + state_index * F + f, chunk_z, mask=f < F)
        row = (FROM + chunk) * C + tl.arange(0, C)
        if begins is not None:
            row = tl.where(row >= tl.load(begins + chunk), row, length)  # a row outside a loads as zero
        for member in range(GROUP):
            head = state_head * GROUP + member
            left = load_tile(a + head * length * F, row, length, f, F, UPCAST)
            right = load_tile(b + head * (LEAD + length) * DV, LEAD + row, LEAD + length, e, DV, UPCAST)
            if factor is not None:
                scaled = left * tl.load(factor + head * length + row)[:, None]
                if mean is not None:
                    mass -= tl.sum(scaled * tl.load(mean + head * length + row)[:, None], 0)
                if right.dtype == tl.float16:
                    right = right.to(tl.bfloat16)  # factors are often below the least fp16 number
                total += dot(tl.trans(scaled), right)
            else:
                if z is not None:
                    mass += tl.sum(left.to(tl.float32), 0)
                total += dot(tl.trans(left), right)
    if states is None:
        store_tile(S, total, f, F, e, DV)
        if z is not None and first_e == 0:
            tl.store(z + f, mass, mask=f < F)


@triton.jit(do_not_specialize=("segments", "cut"))
def carry(
    sums, totals, firsts, initial, segments, cut, SIZE: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Replace the sum of each segment of one sequence by the sum of all segments before it (an
    exclusive prefix sum).

    Args:
        sums: `[N, s, SIZE]`, replaced in place.
        totals: `[N, sequences, SIZE]`, receives the sum of each sequence, or None.
        firsts: `[sequences + 1]`, the first segment of each sequence, and s. With None there is one sequence of
            s - 1 segments. The last entry of `sums` then holds a part of a segment, and the total is that of the
            first `cut` segments plus this entry.
        initial: `[N, SIZE]`, a sum before the first segment, or None.
        segments: s.
        cut: see `firsts`. For packed sequences, at least s.
        REVERSE: sum the segments after it instead.
    """
    state_head, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    if initial is not None:
        total += tl.load(initial + state_head * SIZE + element, mask=element < SIZE, other=0.0).to(tl.float32)
    if firsts is None:
        begin, end = 0, segments - 1
        rest = sums + (state_head * segments + end) * SIZE + element
        last = total + tl.load(rest, mask=element < SIZE, other=0.0)
    else:
        begin, end = tl.load(firsts + sequence), tl.load(firsts + sequence + 1)
        last = total
    for step in range(begin, end):
        segment = begin + end - 1 - step if REVERSE else step
        pointers = sums + (state_head * segments + segment) * SIZE + element
        value = tl.load(pointers, mask=element < SIZE, other=0.0)
        tl.store(pointers, total, mask=element < SIZE)
        total += value
        last += tl.where(segment < cut, value, 0.0)
    if totals is not None:
        pointers = totals + (state_head * tl.num_programs(1) + sequence) * SIZE + element
        tl.store(pointers, last, mask=element < SIZE)


INTERPRETED = not isinstance(fold, triton.JITFunction)


def fold_launcher(
    a: Tensor, b: Tensor, segments: int, chunk: int, reverse: bool = False, start: int = 0, to: int = 0
) -> Callable:
    """Return the kernel `fold` with its grid and compile-time arguments.

    Args:
        a, b: the two inputs, `[N, g, length, F]` and `[N, g, LEAD + length, Dv]`.
        segments: the number of segments.
        chunk: rows in a chunk.
        reverse: True to sum from the last chunk to the first.
        start: the first chunk to read in a and b.
        to: the index of that chunk in the result.
    """
    (heads, group, length, features), width = a.shape, b.shape[-1]
    sizes = tiles(
        "fold", 64, a
    )  # a program has a part of S in both dimensions, so the heads' width does not matter
    BF, BV = (min(sizes.features, padded(x)) for x in (features, width))
    return partial(
        fold[(heads, segments, triton.cdiv(features, BF) * triton.cdiv(width, BV))],
        GROUP=group, C=chunk, F=features, DV=width, LEAD=b.shape[2] - length, SEGMENT=SEGMENT, REVERSE=reverse,
        FROM=start, TO=to, BF=BF, BV=BV, UPCAST=INTERPRETED, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


def empty_states(a: Tensor, b: Tensor, places: int, with_z: bool) -> tuple[Tensor, Tensor | None]:
    """Create uninitialized tensors for S and z before each chunk, `[N, places, F, Dv]` and `[N, places, F]`.

    S is bfloat16 for fp16 inputs: its sums grow with the length of the text and would overflow fp16. z is
    fp32, or None without `with_z`.

    Args:
        a, b: the inputs of `fold`, `[N, g, length, F]` and `[N, g, length, Dv]`.
        places: the number of chunks, or more.
    """
    shape = (len(a), places, a.shape[-1])
    narrow = torch.float32 if a.dtype == torch.float32 else torch.bfloat16
    states = a.new_empty(*shape, b.shape[-1], dtype=narrow)
    return states, a.new_empty(shape, dtype=torch.float32) if with_z else None


def chunk_states(
    a: Tensor, b: Tensor, S: Tensor, z: Tensor | None, chunks: int, chunk: int, factor: Tensor | None = None,
    mean: Tensor | None = None, reverse: bool = False, folds: int | None = None, empty: int = 0,
    onto: tuple[Tensor, Tensor | None] | None = None, start: int = 0, to: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Compute the running sums S = Σ aᵀ b and z = Σ a before each chunk, and after the first `folds` chunks.

    Args:
        a, b: `[N, g, length, F]` and `[N, g, length, Dv]`. b may have more rows before those.
        S, z: `[N, F, Dv]` and `[N, F]`, before the first chunk. z may be None.
        chunks, chunk: number of chunks, and rows in each.
        factor: `[N, g, length]`, by which the rows of a are multiplied, or None.
        mean: `[N, g, length]` or None. With it, z is the sum of `-mean factor a`.
        reverse: sum from the last chunk to the first. S and z then join the sums after the first `folds`
            chunks.
        folds: number of chunks in the returned state, or None for all.
        empty: number of zero entries to append after those of the chunks.
        onto: the first two results of an earlier call, to which the sums are added, or None. One of `start`
            and `to` must then be above 0.
        start: the first chunk to read in a and b.
        to: the index of that chunk in the result.

    Returns:
        S and z before each chunk, `[N, chunks, F, Dv]` and `[N, chunks, F]`, and S and z after the first
        `folds` chunks. In reverse, S and z after each chunk, and S and z before the first chunk.
    """
    heads, _, length, features = a.shape
    cut = chunks if folds is None else folds
    cut = chunks - cut if reverse else cut
    cut_segment = triton.cdiv(cut, SEGMENT)  # index of the sums at the cut
    segments = cut_segment + triton.cdiv(chunks - cut, SEGMENT)
    launch = fold_launcher(a, b, segments, chunk, reverse, start, to)
    sums = S.new_zeros(heads, segments + 1, features, b.shape[-1], dtype=torch.float32)
    joined = [(sums, S)]
    masses: Tensor | None = None
    if z is not None:
        masses = sums.new_zeros(heads, segments + 1, features)
        joined.append((masses, z))
    places = chunks + empty if onto is None else onto[0].shape[1]
    tables = (length, chunks, places, cut, None, None)
    launch(a, b, factor, mean, sums, masses, None, None, *tables)
    for total, initial in joined:
        total[:, cut_segment if reverse else 0] += initial
        total.cumsum_(1)
    states, starts = onto or empty_states(a, b, places, z is not None)
    if empty:
        for x in (states, starts):
            if x is not None:
                x[:, chunks:] = 0.0
    launch(a, b, factor, mean, sums, masses, states, starts, *tables)
    after = -1 if reverse else cut_segment
    S_after, *z_after = (total[:, after].to(initial.dtype) for total, initial in joined)
    return states, starts, S_after, z_after[0] if z_after else None


def packed_states(
    a: Tensor, b: Tensor, chunk: int, packed: Packed, begins: Tensor | None = None, with_z: bool = False,
    factor: Tensor | None = None, mean: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the running sums S = Σ aᵀ b and z = Σ a before each chunk of packed sequences. Each sequence
    starts from zero.

    Args:
        a, b: `[N, g, length, F]` and `[N, g, length, Dv]`. b may have more rows before those.
        chunk: rows in a chunk.
        packed: the tables of where sequences begin.
        begins: `[chunks]`, the first row of a that is summed in each chunk, or None for all rows.
        with_z: compute z too.
        factor: `[N, g, length]`, by which the rows of a are multiplied, or None.
        mean: `[N, g, length]` or None. With it, z is the sum of `-mean factor a`.
        reverse: compute the sums after each chunk instead.

    Returns:
        S `[N, chunks, F, Dv]`, and z `[N, chunks, F]`, or None without `with_z`.
    """
    (heads, _, length, features), chunks, segments = a.shape, len(packed.begins), len(packed.segments) - 1
    launch = fold_launcher(a, b, segments, chunk, reverse)
    sums = a.new_empty(heads, segments, features, b.shape[-1], dtype=torch.float32)
    masses = sums.new_empty(heads, segments, features) if with_z else None
    tables = (length, chunks, chunks, 0, packed.segments, begins)
    launch(a, b, factor, mean, sums, masses, None, None, *tables)
    for x in (sums, masses):
        if x is not None:
            carry_segments(x, None, packed, reverse)
    states, starts = empty_states(a, b, chunks, with_z)
    launch(a, b, factor, mean, sums, masses, states, starts, *tables)
    return states, starts


def packed_sums(a: Tensor, b: Tensor, chunk: int, packed: Packed) -> Tensor:
    """Compute `aᵀ b` over each packed sequence and over the g query heads, in fp32.

    Args:
        a, b: `[N, g, n C, F]` and `[N, g, n C, Dv]`.
        chunk: C.

    Returns:
        `[N, sequences, F, Dv]`.
    """
    (heads, _, length, features), segments = a.shape, len(packed.segments) - 1
    sums = a.new_empty(heads, segments, features, b.shape[-1], dtype=torch.float32)
    totals = sums.new_empty(heads, len(packed.firsts) - 1, features, b.shape[-1])
    tables = (length, len(packed.begins), 0, 0, packed.segments, None)
    fold_launcher(a, b, segments, chunk)(a, b, None, None, sums, None, None, None, *tables)
    carry_segments(sums, totals, packed)
    return totals


def carry_segments(sums: Tensor, totals: Tensor | None, packed: Packed, reverse: bool = False) -> None:
    """Replace the sum of each segment by the sum of all earlier segments of its packed sequence, by the
    kernel `carry`.

    Args:
        sums: `[N, s, ...]`, one entry for each of s segments, replaced in place.
        totals: `[N, sequences, ...]`, receives the sum of each sequence, or None.
        packed: the tables of where sequences begin.
        reverse: True to sum the segments after it instead.
    """
    heads, segments = sums.shape[:2]
    size = sums[0, 0].numel()
    grid = (heads, len(packed.firsts) - 1, triton.cdiv(size, WIDTH))
    options = dict(SIZE=size, REVERSE=reverse, WIDTH=WIDTH, num_warps=4, num_stages=2)
    carry[grid](sums, totals, packed.firsts, None, segments, segments, **options)
