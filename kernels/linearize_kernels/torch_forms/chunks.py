"""Functions that the chunked forms share: they cut a sequence into chunks of query rows and the keys that
each reads.

A slot is the place of one token's key and value. The timeline is the sequence of all slots: R recent tokens,
then n chunks of C new tokens, and A slots at the end if rows see tokens after them. The chunk c of query rows
reads `R + C + A` slots one by one, which are called its columns. They begin at slot c C. Its own C tokens
come after the first R of them. Tokens outside the columns are read through the state S, z.

In shapes, N is batch x heads of S, and g is the number of query heads that read one head of S.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

NARROW = 48  # columns of a product


@dataclass(frozen=True)
class Tiling:
    """The sizes by which the sequence of keys is cut into chunks. A slot is the place of one key and value.

    Attributes:
        chunk: C, tokens in a chunk.
        recent: R, slots before a chunk that it reads.
        ahead: A, slots after a chunk that it reads. It is 0 if queries do not see later tokens. Otherwise it
            is at least R, and R + A is a multiple of C.
    """

    chunk: int
    recent: int
    ahead: int = field(default=0, kw_only=True)

    @property
    def columns(self) -> int:
        """Return R + C + A, the number of keys that a chunk of queries reads directly, not through the state."""
        return self.recent + self.chunk + self.ahead

    @property
    def around(self) -> int:
        """Return (R + A) / C, the length in chunks of the keys around a chunk that it reads directly. 0 if A
        is 0.
        """
        return (self.recent + self.ahead) // self.chunk if self.ahead else 0


def by_chunk(x: Tensor, chunk: int) -> Tensor:
    """Group queries by chunk: `[N, g, n C, X] -> [N, n, g C, X]`. A chunk's rows are its C tokens in all g
    query heads.
    """
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(2, 3)


def by_head(x: Tensor, chunk: int) -> Tensor:
    """Undo `by_chunk`, with C = `chunk`: `[N, n, g C, X] -> [N, g, n C, X]`."""
    return x.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(2, 3)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute `a @ b`. If b has few columns, it is computed as `(bᵀ aᵀ)ᵀ`: CPU libraries are slow at narrow
    results.
    """
    return (b.mT @ a.mT).mT if b.shape[-1] < NARROW else a @ b


def zero_pad(x: Tensor, before: int, after: int = 0) -> Tensor:
    """Pad the T dimension of `x [..., T, X]` with `before` zero rows in front and `after` zero rows behind."""
    return pad(x, (0, 0, before, after)) if before or after else x


def columns(x: Tensor, tiling: Tiling, stop: int | None = None) -> Tensor:
    """Copy, for each of n chunks of C queries, the keys (or values) that it reads: R before it, its own C,
    and A after it.

    The gradient of this is faster than that of `unfold`, because only slices of whole chunks are used.

    Args:
        x: `[N, R + n C + A, X]`, the keys, values or features of all tokens.
        stop: the number of keys to copy for each chunk, from the first on. None means all R + C + A.

    Returns:
        `[N, n, R + C + A, X]`.
    """
    C, chunks = tiling.chunk, (x.shape[1] - tiling.recent - tiling.ahead) // tiling.chunk
    before = -tiling.recent % C
    stop = before + (tiling.columns if stop is None else stop)
    blocks = zero_pad(x, before, -tiling.ahead % C).unflatten(1, (-1, C))
    firsts = range(0, stop, C)
    parts = [blocks[:, i : i + chunks, max(0, before - j) : min(stop - j, C)] for i, j in enumerate(firsts)]
    return torch.cat(parts, 2)


def delays(tiling: Tiling, device: torch.device) -> Tensor:
    """Compute how many tokens before each query i of a chunk each key j is, p_i - p_j: `[C, R + C + A]`.

    A chunk has C queries and reads R + C + A keys. The number is negative for a key after the query.
    """
    row = torch.arange(tiling.chunk, device=device)[:, None]
    return tiling.recent + row - torch.arange(tiling.columns, device=device)


def outside(tiling: Tiling, chunks: int, like: Tensor) -> Tensor:
    """Return a 0/1 matrix `[n, n + around]`: 1 where a chunk of queries reads a chunk of keys only through
    the state S.

    These are the chunks of keys before all keys that the queries read directly. If queries see later tokens,
    they are also the chunks after those keys.

    Args:
        tiling: the sizes of the chunks.
        chunks: n, the number of chunks of queries. There are `around` = `tiling.around` more chunks of keys.
        like: a tensor with the dtype and device of the result.
    """
    row = torch.arange(chunks, device=like.device)[:, None]
    slots = torch.arange(chunks + tiling.around, device=like.device)
    is_outside = (slots < row) | (slots > row + tiling.around) if tiling.ahead else slots < row
    return is_outside.to(like.dtype)


def sums_outside(first: Tensor, sums: Tensor, tiling: Tiling, chunks: int) -> tuple[Tensor, Tensor]:
    """Compute S (or z) for each of n chunks of queries, and S (or z) after all n chunks.

    A chunk reads its nearest keys directly. For the others it reads `first` plus the sums over their chunks
    of keys, which this function adds up.

    Args:
        first: `[N, X]`, S or z before the first chunk, with the last dimensions flattened.
        sums: `[N, n + around, X]`, the sum of φ(k) vᵀ (or φ(k)) over each chunk of keys. `around` is
            `tiling.around`.
        tiling: the sizes of the chunks.
        chunks: n.

    Returns:
        `[N, n, X]`, S (or z) for each chunk, and `[N, X]`, `first` plus the first n chunks of keys.
    """
    weights = outside(tiling, chunks, sums).expand(len(sums), -1, -1)
    return torch.baddbmm(first[:, None], weights, sums), first + sums[:, :chunks].sum(1)


def band(conv: Tensor, tiling: Tiling) -> Tensor:
    """Return the conv's weight of each key for each query of a chunk, `[N, 1, g C, R + C + A]`.

    A chunk has C queries in g heads, and reads R + C + A keys.

    Args:
        conv: `[N, g, W]`, the weight of each distance.
    """
    width, shift = conv.shape[-1], conv.shape[-1] // 2 if tiling.ahead else 0
    before = tiling.recent + tiling.chunk - width + shift
    after = tiling.chunk + tiling.columns - 1 - before - width
    lines = pad(conv.flip(-1), (before, after)).unfold(-1, tiling.columns, 1)  # the last row's comes first
    return lines.flip(2).flatten(1, 2)[:, None]
