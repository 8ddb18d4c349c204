"""What the blocked forms share: a sequence cut into chunks of rows, and the columns of slots that they read.

A timeline has R slots, then n chunks of C, and A slots ahead of the last. Chunk c reads the `R + C + A` columns that
begin at slot c C; its own tokens are behind the first R of them. Heads of keys are lanes `N`, each with g query heads.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.scratch import SCRATCH

NARROW = 48  # columns of a result
FEW = 64  # chunks that are summed one after the other


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


def add_windows(total: Tensor, x: Tensor, shape: Tiling) -> None:
    """The reverse of `windows`: adds `x [N, n, columns, X]` to the slots of `total [N, slots, X]`."""
    chunks = x.shape[1]
    for first in range(0, x.shape[2], shape.chunk):
        piece = x[:, :, first : first + shape.chunk]
        if piece.shape[2] == shape.chunk:
            slots = slice(first, first + chunks * shape.chunk)
            total[:, slots] += piece.flatten(1, 2)
        else:
            spots = total[:, first : first + (chunks - 1) * shape.chunk + piece.shape[2]]
            spots.unfold(1, piece.shape[2], shape.chunk).add_(piece.transpose(-1, -2))


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


def running(chunks: Tensor, first: Tensor, backwards: bool = False, name: str | None = None) -> Tensor:
    """Sums of `first [N, ...]` and of what comes before each of `chunks [N, n, ...]`, and of all of them,
    `[N, n + 1, ...]`; backwards: of what comes behind each, the sum of all first. The chunks are summed before `first`
    joins them, and many of them in halves: a long text's sum would round them away. torch's own `cumsum` takes 20 times
    as long along matrices that lie apart. A name: as of `product`.
    """
    if chunks.shape[1] > FEW:
        early, late = chunks.tensor_split(2, 1)
        if backwards:
            behind = running(late, first, backwards)
            return torch.cat([running(early, behind[:, 0], backwards)[:, :-1], behind], 1)
        before = running(early, first)
        return torch.cat([before[:, :-1], running(late, before[:, -1])], 1)
    shape = len(chunks), chunks.shape[1] + 1, *chunks.shape[2:]
    sums = chunks.new_empty(shape) if name is None else SCRATCH.take(name, chunks, *shape)
    start, rest = (slice(-1, None), slice(0, -1)) if backwards else (slice(0, 1), slice(1, None))
    sums[:, start].zero_()
    if chunks.dim() == 3:
        steps = chunks.flip(1).cumsum(1).flip(1) if backwards else chunks.cumsum(1)
        sums[:, rest] = steps
    else:
        total, steps = sums.unbind(1), chunks.unbind(1)
        if backwards:
            total, steps = total[::-1], steps[::-1]
        for i, step in enumerate(steps):
            torch.add(total[i], step, out=total[i + 1])
    return sums.add_(first[:, None])


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
    empty = [x.new_zeros(*x.shape[:-2], count, x.shape[-1]) for count in (zeros, ahead)]
    return torch.cat([empty[0], x, empty[1]], -2) if zeros or ahead else x
