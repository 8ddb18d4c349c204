"""What the chunked forms share: a sequence cut into chunks of rows, and the columns of slots that each chunk reads.

A timeline has R slots, then n chunks of C slots, and A more slots where rows see ahead. Chunk c reads the `R + C + A`
columns that begin at slot c C; the slots of its own rows follow the first R of them. `N` is batch x heads of S, and
each of these has g query heads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

NARROW = 48  # columns of a product


@dataclass(frozen=True)
class Tiling:
    """How a timeline is cut.

    Attributes:
        chunk: C.
        recent: R.
        ahead: A. Zero if no row sees what comes after it, else at least R and such that `R + A` is whole chunks.
    """

    chunk: int
    recent: int
    ahead: int = field(default=0, kw_only=True)

    @property
    def columns(self) -> int:
        return self.recent + self.chunk + self.ahead

    @property
    def around(self) -> int:
        """Return how many chunks of slots a chunk's columns hold besides its own, if rows see ahead."""
        return (self.recent + self.ahead) // self.chunk if self.ahead else 0


def by_chunk(x: Tensor, chunk: int) -> Tensor:
    """Put query rows in chunks: `[N, g, n C, X] -> [N, n, g C, X]`."""
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(2, 3)


def by_head(x: Tensor, chunk: int) -> Tensor:
    """Undo `by_chunk`: `[N, n, g C, X] -> [N, g, n C, X]`."""
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(2, 3)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute `a @ b`, as the transpose of `bᵀ aᵀ` if it has few columns: CPU libraries are slow at narrow results."""
    return (b.mT @ a.mT).mT if b.shape[-1] < NARROW else a @ b


def zero_pad(x: Tensor, before: int, after: int = 0) -> Tensor:
    """Add empty slots to `x [..., T, X]`."""
    return pad(x, (0, 0, before, after)) if before or after else x


def columns(x: Tensor, tiling: Tiling, stop: int | None = None) -> Tensor:
    """Copy the slots of every chunk's columns, or of the first `stop` of them: `[N, slots, X] -> [N, n, columns, X]`.

    The slices of whole chunks have a faster gradient than `unfold`.
    """
    C, chunks = tiling.chunk, (x.shape[1] - tiling.recent - tiling.ahead) // tiling.chunk
    before = -tiling.recent % C
    stop = before + (tiling.columns if stop is None else stop)
    blocks = zero_pad(x, before, -tiling.ahead % C).unflatten(1, (-1, C))
    firsts = range(0, stop, C)
    parts = [blocks[:, i : i + chunks, max(0, before - j) : min(stop - j, C)] for i, j in enumerate(firsts)]
    return torch.cat(parts, 2)


def delays(tiling: Tiling, device: torch.device) -> Tensor:
    """Compute how far each column is behind each row of its chunk, `[C, R + C + A]`; negative if it is ahead."""
    row = torch.arange(tiling.chunk, device=device)[:, None]
    return tiling.recent + row - torch.arange(tiling.columns, device=device)


def outside(tiling: Tiling, chunks: int, like: Tensor) -> Tensor:
    """Compute which chunks of slots are outside each chunk's columns, `[n, n + around]` of 0 and 1: the ones before
    them, and where rows see ahead also the ones after them.
    """
    row = torch.arange(chunks, device=like.device)[:, None]
    slots = torch.arange(chunks + tiling.around, device=like.device)
    is_outside = (slots < row) | (slots > row + tiling.around) if tiling.ahead else slots < row
    return is_outside.to(like.dtype)


def sums_outside(first: Tensor, sums: Tensor, tiling: Tiling, chunks: int) -> tuple[Tensor, Tensor]:
    """Add up what every chunk reads through the state, and the state after the first n chunks of slots.

    Args:
        first: `[N, X]`, the sum before the timeline.
        sums: `[N, n + around, X]`, the sum of each chunk of slots.

    Returns:
        `[N, n, X]` and `[N, X]`.
    """
    weights = outside(tiling, chunks, sums).expand(len(sums), -1, -1)
    return torch.baddbmm(first[:, None], weights, sums), first + sums[:, :chunks].sum(1)


def band(conv: Tensor, tiling: Tiling) -> Tensor:
    """Write the conv `[N, g, W]` as weights of the columns, `[N, 1, g C, R + C + A]`."""
    width, shift = conv.shape[-1], conv.shape[-1] // 2 if tiling.ahead else 0
    before = tiling.recent + tiling.chunk - width + shift
    after = tiling.chunk + tiling.columns - 1 - before - width
    lines = pad(conv.flip(-1), (before, after)).unfold(-1, tiling.columns, 1)  # the last row's comes first
    return lines.flip(2).flatten(1, 2)[:, None]
