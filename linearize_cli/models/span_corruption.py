"""Span corruption: texts in which spans are masked ("gaps"), to train masked models and encoder-decoders."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = 0.15  # share of a block's tokens that are masked
SPAN = 3  # average number of tokens in a masked span (T5, arXiv 1910.10683)


def row_generator(row: Tensor) -> torch.Generator:
    """Return a generator seeded by the row's tokens, so that every pass masks the same tokens."""
    return torch.Generator().manual_seed(zlib.crc32(row.cpu().numpy().tobytes()))


def spans(length: int, most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Choose random spans of a text to mask (gaps). They cover 15% of its tokens, 3 tokens each on average.

    Args:
        length: the number of tokens in the text.
        most: the largest number of gaps.

    Returns:
        the gaps as (start, end) in tokens, in order. Their number does not depend on the generator. The last
        gap ends the text.
    """
    noise = max(1, round(NOISE * length))
    gaps = max(1, min(round(noise / SPAN), length - noise, most))

    def parts(total: int) -> Tensor:
        cuts = torch.randperm(total - 1, generator=generator)[: gaps - 1].sort().values + 1
        return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([total]))

    kept, hidden = parts(length - noise), parts(noise)
    ends = (kept + hidden).cumsum(0)
    return [(end - size, end) for end, size in zip(ends.tolist(), hidden.tolist(), strict=True)]


def fill(tokens: list[int], gaps: list[tuple[int, int]], marks: Sequence[int]) -> list[int]:
    """Return the text with each gap replaced by one mask token.

    Args:
        tokens: the token ids of the text.
        gaps: the spans (start, end) to replace.
        marks: the mask token of each gap.
    """
    result, last = [], 0
    for mark, (start, end) in zip(marks, gaps, strict=False):
        result += [*tokens[last:start], mark]
        last = end
    return result + tokens[last:]
