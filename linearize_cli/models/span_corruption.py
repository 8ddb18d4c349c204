"""Text with gaps, as masked models and encoder-decoders learn to fill them."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = 0.15  # share of a block's tokens that are masked
SPAN = 3  # tokens of a masked span, on average (T5, arXiv 1910.10683)


def chance(row: Tensor) -> torch.Generator:
    """Chance that the row's own tokens decide: a resumed run and every measurement see the same."""
    return torch.Generator().manual_seed(zlib.crc32(row.cpu().numpy().tobytes()))


def spans(length: int, most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Random gaps (start, end) of a text: NOISE of its tokens in spans of SPAN on average, as many whatever the
    chance; the last one ends the text.
    """
    noise = max(1, round(NOISE * length))
    pieces = max(1, min(round(noise / SPAN), length - noise, most))

    def parts(total: int) -> Tensor:
        cuts = torch.randperm(total - 1, generator=generator)[: pieces - 1].sort().values + 1
        return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([total]))

    kept, hidden = parts(length - noise), parts(noise)
    ends = (kept + hidden).cumsum(0)
    return [(end - size, end) for end, size in zip(ends.tolist(), hidden.tolist(), strict=True)]


def fill(tokens: list[int], gaps: list[tuple[int, int]], marks: Sequence[int]) -> list[int]:
    """The text with a mark in the place of each gap."""
    result, last = [], 0
    for mark, (start, end) in zip(marks, gaps, strict=False):
        result += [*tokens[last:start], mark]
        last = end
    return result + tokens[last:]
