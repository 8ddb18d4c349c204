"""A test that tokens follow a model's distribution: the probability integral transform and a chi-square test."""

from typing import Any

import torch
from torch import Tensor

BINS = 20


def distribution(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Return the probabilities `[M, vocab]` that tokens are sampled from, in fp64 on the CPU.

    Args:
        logits: `[M, vocab]`.
        temperature: the sampling temperature.
        top_p: keep the most probable tokens up to this total probability. All others get 0. 1 keeps all
            tokens.
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
    """Compute the randomised probability integral transform of each token.

    Tokens are ordered by falling probability. The value of a token is the total probability of all tokens
    before it, plus a random share of its own. If the tokens follow the distribution, the values are uniform.

    Args:
        logits: `[M, vocab]`. The distributions follow from them by `temperature` and `top_p`.
        tokens: `[M]`, one token of each distribution.
        generator: draws the random shares.

    Returns:
        `[M]` in [0, 1), in fp64.
    """
    p = distribution(logits, temperature, top_p)
    order = p.argsort(dim=-1, descending=True, stable=True)
    before = p.gather(-1, order).cumsum(-1)
    rank = (order == tokens.cpu()[:, None]).int().argmax(-1, keepdim=True)
    own = p.gather(-1, tokens.cpu()[:, None])
    share = torch.rand(own.shape, dtype=own.dtype, generator=generator)
    return (before.gather(-1, rank) - own + share * own).squeeze(-1).clamp(0, 1 - 1e-12)


def uniformity(values: Tensor, bins: int = BINS) -> dict[str, Any]:
    """Test with a chi-square test that values `[M]` in [0, 1) are uniform.

    Args:
        bins: the number of equal bins.

    Returns:
        `tokens`: M. `bins`: the number of bins. `chi_square`: the statistic. `p_value`: the probability of a
            statistic at least as large if the values are uniform.
    """
    counts = (values * bins).long().bincount(minlength=bins).double()
    expected = len(values) / bins
    chi_square = ((counts - expected).square() / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((bins - 1) / 2).double(), chi_square / 2)
    return {"tokens": len(values), "bins": bins, "chi_square": chi_square.item(), "p_value": p_value.item()}
