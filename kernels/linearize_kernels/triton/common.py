"""What the Triton kernels of the blocked forms share: tiles of matrices, the conv as a band, S before each chunk."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from linearize_kernels.triton.tuning import SEGMENT, Packed, padded, tiles

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

WIDTH = 512  # numbers that a program of `carry` adds up at a time


@triton.jit
def tile(x, row, end, column, WIDTH: tl.constexpr, UP: tl.constexpr):
    """Rows and columns of a matrix `[end, WIDTH]`, zero outside. UP: in fp32, for the interpreter."""
    there = (row < end)[:, None] & (column < WIDTH)[None, :]
    out = tl.load(x + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0)
    if UP:
        out = out.to(tl.float32)
    return out


@triton.jit
def put(x, value, row, end, column, WIDTH: tl.constexpr):
    """The reverse of `tile`."""
    there = (row < end)[:, None] & (column < WIDTH)[None, :]
    tl.store(x + row[:, None] * WIDTH + column[None, :], value.to(x.dtype.element_ty), mask=there)


@triton.jit
def dot(a, b):
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def band(conv, delay, W: tl.constexpr):
    """The conv's weights by delay."""
    return tl.load(conv + delay, mask=(delay >= 0) & (delay < W), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("cut",))
def fold(
    a, b, factor, mean, S, z, states, masses, length, chunks, places, cut, segments, begins,
    GROUP: tl.constexpr, C: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, LEAD: tl.constexpr,
    SEGMENT: tl.constexpr, REVERSE: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Sums of `a bᵀ` over the chunks of a segment: `a [N, g, length, F]`, `b [N, g, LEAD + length, Dv]`.

    Without `states`, writes segment i's sums to place i + 1 of `S [N, segments + 1, F, Dv]` and
    `z [N, segments + 1, F]`. With them, reads at place i what comes before segment i, and writes what comes before
    each chunk, `[N, places, F, Dv]` and `[N, places, F]`. REVERSE: before means after. The first chunk is at FROM in a
    and b and at TO in `states`; if one of these is above 0, sums are added to what is there. A segment has SEGMENT
    chunks, or fewer before the `cut`th and the end. `factor [N, g, length]` scales a; z sums a, or `-mean` times it,
    or is None.

    Packed sequences: `segments [s + 1]` are their first chunks and the end, REVERSE or not; the place of segment i is i
    of s both times. `begins [chunks]` are the first of a's rows that count in each.
    """
    lane, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.program_id(2) // tl.cdiv(DV, BV) * BF + tl.arange(0, BF)
    first_e = tl.program_id(2) % tl.cdiv(DV, BV) * BV
    e = first_e + tl.arange(0, BV)
    place = lane * tl.num_programs(1) + segment
    if segments is None:
        place += lane
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
        place += 1
    S += place * F * DV
    if z is not None:
        z += place * F
    if states is not None:
        total += tile(S, f, F, e, DV, UP)
        if z is not None:
            mass += tl.load(z + f, mask=f < F, other=0.0)
    for order in range(0, end - begin):
        chunk = last - order if REVERSE else begin + order
        if states is not None:
            own_place = lane * places + TO + chunk
            own_total, own_mass = total, mass
            if FROM + TO > 0:
                own_total += tile(states + own_place * F * DV, f, F, e, DV, UP)
            put(states + own_place * F * DV, own_total, f, F, e, DV)
            if z is not None and first_e == 0:
                if FROM + TO > 0:
                    own_mass += tl.load(masses + own_place * F + f, mask=f < F, other=0.0)
                tl.store(masses + own_place * F + f, own_mass, mask=f < F)
        row = (FROM + chunk) * C + tl.arange(0, C)
        if begins is not None:
            row = tl.where(row >= tl.load(begins + chunk), row, length)  # at the end, where nothing is
        for member in range(GROUP):
            head = lane * GROUP + member
            own = tile(a + head * length * F, row, length, f, F, UP)
            right = tile(b + head * (LEAD + length) * DV, LEAD + row, LEAD + length, e, DV, UP)
            if factor is not None:
                scaled = own * tl.load(factor + head * length + row)[:, None]
                if mean is not None:
                    mass -= tl.sum(scaled * tl.load(mean + head * length + row)[:, None], 0)
                if right.dtype == tl.float16:
                    right = right.to(tl.bfloat16)  # factors are often below fp16's least
                total += dot(tl.trans(scaled), right)
            else:
                if z is not None:
                    mass += tl.sum(own.to(tl.float32), 0)
                total += dot(tl.trans(own), right)
    if states is None:
        put(S, total, f, F, e, DV)
        if z is not None and first_e == 0:
            tl.store(z + f, mass, mask=f < F)


@triton.jit(do_not_specialize=("segments",))
def carry(sums, totals, firsts, segments, SIZE: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr):
    """Of one sequence, what comes before each segment in the place of the segment's own sum, `sums [N, s, SIZE]`, and
    the sum of all, `totals [N, sequences, SIZE]` or None. REVERSE: before means after.
    """
    lane, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    spot = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    begin, end = tl.load(firsts + own), tl.load(firsts + own + 1)
    for order in range(begin, end):
        segment = begin + end - 1 - order if REVERSE else order
        here = sums + (lane * segments + segment) * SIZE + spot
        value = tl.load(here, mask=spot < SIZE, other=0.0)
        tl.store(here, total, mask=spot < SIZE)
        total += value
    if totals is not None:
        tl.store(totals + (lane * tl.num_programs(1) + own) * SIZE + spot, total, mask=spot < SIZE)


INTERPRETED = not isinstance(fold, triton.JITFunction)


def folding(
    a: Tensor, b: Tensor, segments: int, chunk: int, reverse: bool = False, start: int = 0, to: int = 0
) -> Callable:
    """`fold` of so many segments, but for its pointers and numbers."""
    (lanes, group, length, features), width = a.shape, b.shape[-1]
    own = tiles("fold", 64, a)  # S is cut both ways, so heads' width does not count
    BF, BV = (min(own.features, padded(x)) for x in (features, width))
    return partial(
        fold[(lanes, segments, triton.cdiv(features, BF) * triton.cdiv(width, BV))],
        GROUP=group, C=chunk, F=features, DV=width, LEAD=b.shape[2] - length, SEGMENT=SEGMENT, REVERSE=reverse,
        FROM=start, TO=to, BF=BF, BV=BV, UP=INTERPRETED, num_warps=own.warps, num_stages=own.stages,
    )  # fmt: skip


def empty_states(a: Tensor, b: Tensor, places: int, with_z: bool) -> tuple[Tensor, Tensor | None]:
    """Room for S and z before each chunk; S is no fp16, which would overflow: sums grow with the text."""
    shape = (len(a), places, a.shape[-1])
    narrow = torch.float32 if a.dtype == torch.float32 else torch.bfloat16
    states = a.new_empty(*shape, b.shape[-1], dtype=narrow)
    return states, a.new_empty(shape, dtype=torch.float32) if with_z else None


def folded(
    a: Tensor, b: Tensor, S: Tensor, z: Tensor | None, chunks: int, chunk: int, factor: Tensor | None = None,
    mean: Tensor | None = None, reverse: bool = False, folds: int | None = None, empty: int = 0,
    onto: tuple[Tensor, Tensor | None] | None = None, start: int = 0, to: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """S and z before each chunk, `[N, chunks, F, Dv]` and `[N, chunks, F]`, and after `folds` of them, as `fold` says.

    Args:
        a: `[N, g, length, F]`; b: `[N, g, length, Dv]`, or with more rows before those.
        S, z: before the first chunk; z None: there is none. In reverse, what joins the sums at `folds` chunks from
            the first; what is returned is before the first.
        folds: None: all chunks.
        empty: places in what is returned after those of the chunks, zero.
        onto: what `folded` returned, from whose place `to` on the sums before the chunks are added that begin at chunk
            `start` of a and b; one of the two is above 0.
    """
    lanes, _, length, features = a.shape
    cut = chunks if folds is None else folds
    cut = chunks - cut if reverse else cut
    place = triton.cdiv(cut, SEGMENT)  # of the sums at the cut
    segments = place + triton.cdiv(chunks - cut, SEGMENT)
    launch = folding(a, b, segments, chunk, reverse, start, to)
    sums = S.new_zeros(lanes, segments + 1, features, b.shape[-1], dtype=torch.float32)
    masses = None if z is None else sums.new_zeros(lanes, segments + 1, features)
    places = chunks + empty if onto is None else onto[0].shape[1]
    tables = (length, chunks, places, cut, None, None)
    launch(a, b, factor, mean, sums, masses, None, None, *tables)
    for total, joins in ((sums, S), (masses, z)):
        if total is not None:
            total[:, place if reverse else 0] += joins
            total.cumsum_(1)
    states, starts = onto or empty_states(a, b, places, z is not None)
    if empty:
        for x in (states, starts):
            if x is not None:
                x[:, chunks:] = 0.0
    launch(a, b, factor, mean, sums, masses, states, starts, *tables)
    after = -1 if reverse else place
    return states, starts, sums[:, after].to(S.dtype), None if z is None else masses[:, after].to(z.dtype)


def folded_apart(
    a: Tensor, b: Tensor, chunk: int, packed: Packed, begins: Tensor | None = None, with_z: bool = False,
    factor: Tensor | None = None, mean: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `folded`, of packed sequences: what comes before each chunk, in reverse after it, in its own sequence.
    begins: as in `fold`.
    """
    (lanes, _, length, features), chunks, segments = a.shape, len(packed.begins), len(packed.segments) - 1
    launch = folding(a, b, segments, chunk, reverse)
    sums = a.new_empty(lanes, segments, features, b.shape[-1], dtype=torch.float32)
    masses = sums.new_empty(lanes, segments, features) if with_z else None
    tables = (length, chunks, chunks, 0, packed.segments, begins)
    launch(a, b, factor, mean, sums, masses, None, None, *tables)
    for x in (sums, masses):
        if x is not None:
            carried(x, None, packed, reverse)
    states, starts = empty_states(a, b, chunks, with_z)
    launch(a, b, factor, mean, sums, masses, states, starts, *tables)
    return states, starts


def summed_apart(a: Tensor, b: Tensor, chunk: int, packed: Packed) -> Tensor:
    """`aᵀ b` over every packed sequence and all g, in fp32: `[N, g, n C, F]` and `[N, g, n C, Dv]` give
    `[N, sequences, F, Dv]`.
    """
    (lanes, _, length, features), segments = a.shape, len(packed.segments) - 1
    sums = a.new_empty(lanes, segments, features, b.shape[-1], dtype=torch.float32)
    totals = sums.new_empty(lanes, len(packed.firsts) - 1, features, b.shape[-1])
    tables = (length, len(packed.begins), 0, 0, packed.segments, None)
    folding(a, b, segments, chunk)(a, b, None, None, sums, None, None, None, *tables)
    carried(sums, totals, packed)
    return totals


def carried(sums: Tensor, totals: Tensor | None, packed: Packed, reverse: bool = False) -> None:
    """`carry` of all sequences."""
    lanes, segments = sums.shape[:2]
    size = sums[0, 0].numel()
    grid = (lanes, len(packed.firsts) - 1, triton.cdiv(size, WIDTH))
    own = dict(SIZE=size, REVERSE=reverse, WIDTH=WIDTH, num_warps=4, num_stages=2)
    carry[grid](sums, totals, packed.firsts, segments, **own)
