"""Whether tokens are drawn from a model's own distribution: the probability integral transform, and a chi-square."""

from typing import Any

import torch
from torch import Tensor

BINS = 20


def distribution(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Return the probabilities `[M, vocab]` that tokens are to be drawn from, in fp64.

    Args:
        top_p: the mass that the most probable tokens must hold; all others get 0.
    """
    p = (logits.double() / temperature).softmax(-1).cpu()
    if top_p < 1:
        falling = p.sort(dim=-1, descending=True)
        beyond = falling.values.cumsum(-1) - falling.values >= top_p
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, falling.indices, beyond), 0.0)
    return p / p.sum(-1, keepdim=True)


def integral_transform(
    logits: Tensor, tokens: Tensor, temperature: float, generator: torch.Generator, top_p: float = 1.0
) -> Tensor:
    """`[M]` in [0, 1): where each token lies in its distribution. Of tokens that were drawn from it, uniform.

    Tokens are ordered by falling probability; a token's place is the mass before it, and a random share of its own.

    Args:
        logits: `[M, vocab]` that the tokens `[M]` were drawn from, at this temperature and `top_p`.
    """
    p = distribution(logits, temperature, top_p)
    order = p.argsort(dim=-1, descending=True, stable=True)
    before = p.gather(-1, order).cumsum(-1)
    rank = (order == tokens.cpu()[:, None]).int().argmax(-1, keepdim=True)
    own = p.gather(-1, tokens.cpu()[:, None])
    share = torch.rand(own.shape, dtype=own.dtype, generator=generator)
    return (before.gather(-1, rank) - own + share * own).squeeze(-1).clamp(0, 1 - 1e-12)


def uniformity(places: Tensor, bins: int = BINS) -> dict[str, Any]:
    """A chi-square test that places `[M]` in [0, 1) are uniform.

    Returns:
        `tokens` M, `chi_square` of `bins` bins, and `p_value`: how probable a chi-square as large is if they are.
    """
    counts = (places * bins).long().bincount(minlength=bins).double()
    expected = len(places) / bins
    chi_square = ((counts - expected).square() / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((bins - 1) / 2).double(), chi_square / 2)
    return {"tokens": len(places), "bins": bins, "chi_square": chi_square.item(), "p_value": p_value.item()}
