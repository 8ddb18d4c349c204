"""What the blocked forms share: a sequence cut into chunks of rows, and the columns of slots that they read.

A timeline has R slots, then n chunks of C, and A slots ahead of the last. Chunk c reads the `R + C + A` columns that
begin at slot c C; its own tokens are behind the first R of them. Heads of keys are lanes `N`, each with g query heads.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.torch_forms.scratch import SCRATCH

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
    """The slots of every chunk's columns, or of the first ones: a view `[N, slots, X] -> [N, n, columns, X]`."""
    chunks = (x.shape[1] - shape.recent - shape.ahead) // shape.chunk
    columns = shape.columns if columns is None else columns
    return x[:, : (chunks - 1) * shape.chunk + columns].unfold(1, columns, shape.chunk).transpose(-1, -2)


def put_columns(total: Tensor, a: Tensor, b: Tensor, shape: Tiling, scale: float = 1.0) -> None:
    """Puts products `scale aᵀ b` of weights `a [N, n, rows, columns]` and `b [N, n, rows, X]` among slots,
    `total [N, slots, X]`: those of a column in its slot, where those of different chunks add up.
    """
    chunks, columns = a.shape[1], a.shape[3]
    total[:, chunks * shape.chunk :].zero_()  # the first C columns' are written, and the others are added
    for first in range(0, columns, shape.chunk):
        part = a[..., first : first + shape.chunk].mT
        width = part.shape[2]
        slots = total[:, first : first + (chunks - 1) * shape.chunk + width]
        put_product(slots.unfold(1, width, shape.chunk).mT, part, b, scale, kept=first > 0)


def put_product(to: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, kept: bool = False) -> None:
    """Puts `scale a @ b` into `to [N, n, I, J]`; kept: adds it. Lane by lane that needs no other memory, but many calls
    where there are more lanes than chunks.
    """
    if len(to) <= to.shape[1]:
        for place, own_a, own_b in zip(to, a, b, strict=True):
            torch.baddbmm(place, own_a, own_b, beta=int(kept), alpha=scale, out=place)
    elif kept:
        to.add_(a @ b, alpha=scale)
    else:
        torch.mul(a @ b, scale, out=to)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `a @ b`, `[N, n, C, X]`, to `total [N, n C, X]`."""
    put_product(total.unflatten(1, (a.shape[1], -1)), a, b, kept=True)


def flat(x: Tensor) -> Tensor:
    """`[N, n, I, J] -> [N n, I, J]`, as `bmm` takes it."""
    return x.flatten(0, 1)


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
    a: Tensor, b: Tensor, first: Tensor, backwards: bool = False, out: Tensor | None = None
) -> Tensor:
    """`running` of the products of chunks: of `first [N, F, Dv]` and `aᵀ b`, `a [N, n, C, F]` and `b [N, n, C, Dv]`,
    `[N, n + 1, F, Dv]`, in memory `out` if given. These are summed by FEW, and without first, which joins them last: a
    long text's sum would round them away.
    """
    if out is None:
        out = a.new_empty(len(a), a.shape[1] + 1, *first.shape[1:])
    before, products = (out[:, -1:], out[:, :-1]) if backwards else (out[:, :1], out[:, 1:])
    before.copy_(first[:, None])
    if not a.shape[1]:
        return out
    put_product(products, a.mT, b)
    whole = products.shape[1] // FEW
    parts = [products[:, : whole * FEW].unflatten(1, (whole, FEW)), products[:, None, whole * FEW :]]
    for part in parts[0 if whole else 1 :]:
        steps = part.unbind(2)
        for one, after in pairwise(reversed(steps) if backwards else steps):
            after.add_(one)
    total, start = torch.zeros_like(before), before
    groups = products.split(FEW, 1)
    for some in reversed(groups) if backwards else groups:
        total.add_(some[:, :1] if backwards else some[:, -1:])
        some.add_(start)
        start = before + total
    return out


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
