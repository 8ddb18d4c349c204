"""What the blocked forms share: a sequence cut into chunks of rows, and the columns of slots that they read.

A timeline has R slots, then n chunks of C, and A slots ahead of the last. Chunk c reads the `R + C + A` columns that
begin at slot c C; its own tokens are behind the first R of them. Heads of keys are lanes `N`, each with g query heads.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.scratch import SCRATCH

NARROW = 48  # columns of a result
FEW = 16  # chunks that are summed one after the other
CACHED = 1 << 18  # numbers in the largest matrix that is worked on at a time, on a CPU


def at_once(numbers: int) -> int:
    """How many parts of so many numbers are worked on together."""
    return max(1, CACHED // numbers)


@dataclass(frozen=True)
class Tiling:
    """
    Attributes:
        chunk: C; recent: R.
        ahead: A, at least R, so that `R + A` is whole chunks; 0: no row sees what comes after it.
    """

    chunk: int
    recent: int
    ahead: int = field(default=0, kw_only=True)

    @property
    def columns(self) -> int:
        return self.recent + self.chunk + self.ahead

    @property
    def around(self) -> int:
        """Chunks of slots that a chunk's columns hold but for C, where rows see ahead."""
        return (self.recent + self.ahead) // self.chunk if self.ahead else 0


class Packed(NamedTuple):
    """Sequences packed into one timeline: each begins with a chunk, from nothing, and is filled up to whole chunks.

    Attributes:
        begins: `[n]` int32, by chunk, the first slot of its sequence behind the sinks.
        segments: `[s + 1]` int32, the first chunk of each segment of S's sums, and n; no segment is of two sequences.
        firsts: `[sequences + 1]` int32, the first segment of each sequence, and s.
        sinks: so many first tokens of each sequence, no more than a chunk has.
    """

    begins: Tensor
    segments: Tensor
    firsts: Tensor
    sinks: int


def windows(x: Tensor, shape: Tiling, columns: int | None = None) -> Tensor:
    """The slots of every chunk's columns, or of the first ones: `[N, slots, X] -> [N, n, columns, X]`, for one lane
    without a copy.
    """
    chunks = (x.shape[1] - shape.recent - shape.ahead) // shape.chunk
    columns = shape.columns if columns is None else columns
    view = x[:, : (chunks - 1) * shape.chunk + columns].unfold(1, columns, shape.chunk).transpose(-1, -2)
    return view if len(x) == 1 else view.contiguous()


def put_products(total: Tensor, a: Tensor, b: Tensor, shape: Tiling, scale: float = 1.0) -> None:
    """Puts `scale aᵀ b` of weights `a [N, n, rows, columns]` and `b [N, n, rows, X]` into the slots of the columns,
    `total [N, slots, X]`, where those of different chunks add up.
    """
    chunks, columns = a.shape[1], a.shape[3]
    total[:, chunks * shape.chunk if columns >= shape.chunk else 0 :] = 0
    for first in range(0, columns, shape.chunk):
        part = a[..., first : first + shape.chunk].mT
        if part.shape[2] == shape.chunk:
            accumulate(total[:, first : first + chunks * shape.chunk], part, b, scale, kept=first > 0)
        else:
            spots = total[:, first : first + (chunks - 1) * shape.chunk + part.shape[2]]
            spots.unfold(1, part.shape[2], shape.chunk).add_((part @ b).mT, alpha=scale)


def accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, kept: bool = True) -> None:
    """Adds `scale a @ b`, `[N, n, C, X]`, to `total [N, n C, X]`; not kept: puts it there."""
    if len(total) > 1:
        total = total if kept else total.zero_()
        total.add_((a @ b).flatten(1, 2), alpha=scale)
        return
    chunks = total.view(-1, *a.shape[2:3], b.shape[3])
    torch.baddbmm(chunks, a.flatten(0, 1), b.flatten(0, 1), beta=int(kept), alpha=scale, out=chunks)


def by_chunk(x: Tensor, shape: Tiling) -> Tensor:
    """Query rows: `[N, g, n C, X] -> [N, n, g C, X]`."""
    return x.unflatten(2, (-1, shape.chunk)).transpose(1, 2).flatten(2, 3)


def by_head(x: Tensor, shape: Tiling) -> Tensor:
    """The reverse of `by_chunk`."""
    return x.unflatten(2, (-1, shape.chunk)).transpose(1, 2).flatten(2, 3)


def band(conv: Tensor, shape: Tiling) -> Tensor:
    """The conv as weights of the columns: `[N, g, W] -> [N, 1, g C, R + C + A]`."""
    out = conv.new_zeros(*conv.shape[:2], shape.chunk, shape.columns)
    diagonals(out, shape, conv.shape[-1]).copy_(conv.flip(-1)[:, :, None])
    return out.flatten(1, 2)[:, None]


def diagonals(x: Tensor, shape: Tiling, width: int) -> Tensor:
    """The conv's columns of each row, of a contiguous `x [N, g, C, R + C + A]`: `[N, g, C, W]`, a view. The row's own
    is the last, or where rows see ahead that `W div 2` before the last.
    """
    columns = x.shape[-1]
    last = shape.recent + (width // 2 if shape.ahead else 0)
    first = x.storage_offset() + last - width + 1
    return x.as_strided((*x.shape[:3], width), (*x.stride()[:2], columns + 1, 1), first)


def running(chunks: Tensor, first: Tensor, backwards: bool = False) -> Tensor:
    """Sums of `first [N, F]` and of what comes before each of `chunks [N, n, F]`, and of all of them, `[N, n + 1, F]`;
    backwards: of what comes behind each, the sum of all first.
    """
    if backwards:
        return running(chunks.flip(1), first).flip(1)
    return torch.cat([torch.zeros_like(first)[:, None], chunks], 1).cumsum(1).add_(first[:, None])


def running_sums(
    a: Tensor, b: Tensor, first: Tensor, backwards: bool = False, name: str | None = None
) -> Tensor:
    """As `running`, of `first [N, F, Dv]` and the chunks' products `aᵀ b`, `a [N, n, C, F]` and `b [N, n, C, Dv]`:
    `[N, n + 1, F, Dv]`. A name: as of `product`.
    """
    shape = len(a), a.shape[1] + 1, *first.shape[1:]
    sums = a.new_empty(shape) if name is None else SCRATCH.take(name, a, *shape)
    sums[:, -1 if backwards else 0] = first
    products = sums[:, :-1] if backwards else sums[:, 1:]
    if len(a) == 1:
        torch.bmm(a[0].mT, b[0], out=products[0])
    else:
        products.copy_(a.mT @ b)
    running_in_place(products, first, backwards)
    return sums


def running_in_place(x: Tensor, first: Tensor, backwards: bool) -> None:
    """Makes each of `x [N, n, F, Dv]` its sum with first and all before it, or behind it. They are summed by FEW, and
    without first, which joins them last: a long text's sum would round them away.
    """
    if x.shape[1] == 0:
        return
    groups, whole = x.split(FEW, 1), x.shape[1] // FEW
    for some in (x[:, : whole * FEW].unflatten(1, (whole, FEW)), x[:, None, whole * FEW :]):
        steps = some.unbind(2)
        for before, own in pairwise(reversed(steps) if backwards else steps):
            own.add_(before)
    total = torch.zeros_like(first)
    for some in reversed(groups) if backwards else groups:
        before, total = first + total, total + some[:, 0 if backwards else -1]
        some.add_(before[:, None])


def product(a: Tensor, b: Tensor, name: str | None = None) -> Tensor:
    """`a @ b` of matrices `[..., I, J]`, made as its own transpose where that has the longer rows: libraries are slow
    at narrow results. With a name it is in that memory of `SCRATCH`.
    """
    if b.shape[-1] < NARROW:
        return matmul(b.mT, a.mT, name).mT
    return matmul(a, b, name)


def matmul(a: Tensor, b: Tensor, name: str | None) -> Tensor:
    if name is None:
        return a @ b
    out = SCRATCH.take(name, a, *a.shape[:-1], b.shape[-1])
    torch.bmm(*(x.flatten(0, -3) for x in (a, b)), out=out.flatten(0, -3))
    return out


def led(x: Tensor, zeros: int, ahead: int = 0) -> Tensor:
    """`x [..., T, X]` between so many empty slots."""
    if not zeros and not ahead:
        return x
    empty = [x.new_zeros(*x.shape[:-2], count, x.shape[-1]) for count in (zeros, ahead)]
    return torch.cat([empty[0], x, empty[1]], -2)
