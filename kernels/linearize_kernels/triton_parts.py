"""What the Triton kernels of the blocked forms share: tiles of matrices, the conv as a band, S before each chunk."""

import torch
from torch import Tensor

from linearize_kernels.triton_tiles import padded, tiles

try:  # a loader of remote code demands what is imported outside
    import triton
    import triton.language as tl
except ImportError:
    raise

SEGMENT = 8  # chunks that a program of `fold` goes through


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
    a, b, factor, mean, S, z, states, masses, length, chunks, places, cut,
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
    """
    lane, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.program_id(2) // tl.cdiv(DV, BV) * BF + tl.arange(0, BF)
    first_e = tl.program_id(2) % tl.cdiv(DV, BV) * BV
    e = first_e + tl.arange(0, BV)
    place = lane * (tl.num_programs(1) + 1) + segment
    total = tl.zeros((BF, BV), tl.float32)
    mass = tl.zeros((BF,), tl.float32)
    if states is None:
        place += 1
    S += place * F * DV
    if z is not None:
        z += place * F
    if states is not None:
        total += tile(S, f, F, e, DV, UP)
        if z is not None:
            mass += tl.load(z + f, mask=f < F, other=0.0)
    uncut = segment * SEGMENT
    begin = tl.where(uncut < cut, uncut, cut + (segment - tl.cdiv(cut, SEGMENT)) * SEGMENT)
    end = tl.minimum(begin + SEGMENT, tl.where(uncut < cut, cut, chunks))
    for order in range(begin, end):
        chunk = chunks - 1 - order if REVERSE else order
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


INTERPRETED = not isinstance(fold, triton.JITFunction)


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
    (lanes, group, length, features), width = a.shape, b.shape[-1]
    own = tiles("fold", 64, a)  # S is cut both ways, so heads' width does not count
    cut = chunks if folds is None else folds
    cut = chunks - cut if reverse else cut
    place = triton.cdiv(cut, SEGMENT)  # of the sums at the cut
    segments = place + triton.cdiv(chunks - cut, SEGMENT)
    BF, BV = (min(own.features, padded(x)) for x in (features, width))
    grid = (lanes, segments, triton.cdiv(features, BF) * triton.cdiv(width, BV))
    common = dict(
        GROUP=group, C=chunk, F=features, DV=width, LEAD=b.shape[2] - length, SEGMENT=SEGMENT, REVERSE=reverse,
        FROM=start, TO=to, BF=BF, BV=BV, UP=INTERPRETED, num_warps=own.warps, num_stages=own.stages,
    )  # fmt: skip
    sums = S.new_zeros(lanes, segments + 1, features, width, dtype=torch.float32)
    masses = None if z is None else sums.new_zeros(lanes, segments + 1, features)
    places = chunks + empty if onto is None else onto[0].shape[1]
    fold[grid](a, b, factor, mean, sums, masses, None, None, length, chunks, places, cut, **common)
    for total, joins in ((sums, S), (masses, z)):
        if total is not None:
            total[:, place if reverse else 0] += joins
            total.cumsum_(1)
    if onto is None:
        # fp16 would overflow: sums grow with the text
        narrow = torch.float32 if a.dtype == torch.float32 else torch.bfloat16
        states = S.new_empty(lanes, places, features, width, dtype=narrow)
        starts = None if z is None else masses.new_empty(lanes, places, features)
        for x in (states, starts):
            if x is not None:
                x[:, chunks:] = 0.0
    else:
        states, starts = onto
    fold[grid](a, b, factor, mean, sums, masses, states, starts, length, chunks, places, cut, **common)
    after = -1 if reverse else place
    return states, starts, sums[:, after].to(S.dtype), None if z is None else masses[:, after].to(z.dtype)
