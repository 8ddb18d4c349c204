"""What the blocked forms share: a sequence cut into chunks of rows, and the columns of slots that they read.

A timeline has R slots and then n chunks of C. Chunk c reads the `R + C` columns that begin at slot c C; in the last C
of them are its own tokens. Heads of keys are lanes `N`, each with g query heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NARROW = 48  # columns of a result


@dataclass(frozen=True)
class Tiling:
    """
    Attributes:
        chunk: C; recent: R.
    """

    chunk: int
    recent: int


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
    chunks = (x.shape[1] - shape.recent) // shape.chunk
    columns = shape.recent + shape.chunk if columns is None else columns
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
    """The conv as weights of the columns: `[N, g, W] -> [N, 1, g C, R + C]`."""
    width, columns = conv.shape[-1], shape.recent + shape.chunk
    out = conv.new_zeros(*conv.shape[:2], shape.chunk, columns)
    diagonals(out, shape, width).copy_(conv.flip(-1)[:, :, None])
    return out.flatten(1, 2)[:, None]


def diagonals(x: Tensor, shape: Tiling, width: int) -> Tensor:
    """The conv's columns of each row, its own last, of a contiguous `x [N, g, C, R + C]`: `[N, g, C, W]`, a view."""
    columns = x.shape[-1]
    first = x.storage_offset() + shape.recent - width + 1
    return x.as_strided((*x.shape[:3], width), (*x.stride()[:2], columns + 1, 1), first)


def running(chunks: Tensor, first: Tensor, backwards: bool = False) -> Tensor:
    """Sums of `first [N, ...]` and of what comes before each of `chunks [N, n, ...]`, and of all of them,
    `[N, n + 1, ...]`; backwards: of what comes behind each, the sum of all first. Chunks are few: one product with a
    triangle costs less than their sum one by one.
    """
    count = chunks.shape[1]
    triangle = chunks.new_ones(count + 1, count)
    triangle = triangle.triu() if backwards else triangle.tril(-1)
    sums = (triangle @ chunks.flatten(2)).unflatten(2, chunks.shape[2:])
    return sums.add_(first[:, None])


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, made as its own transpose where that has the longer rows: libraries are slow at narrow results."""
    return (b.mT @ a.mT).mT if b.shape[-1] < NARROW else a @ b


def led(x: Tensor, zeros: int) -> Tensor:
    """`x [..., T, X]` behind so many empty slots."""
    return x if zeros == 0 else torch.cat([x.new_zeros(*x.shape[:-2], zeros, x.shape[-1]), x], -2)
