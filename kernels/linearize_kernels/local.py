"""Scores of the local part, and how they join with the far part.

A score is a function of grouped queries and keys. A combine is a module that turns the scores and the far
part's mass into the local weights and the far coefficient of

    o_i = Σ_{j∈L(i)} weight_ij v_j + coefficient_i φ(q_i)ᵀ Σ_{j∈F(i)} φ(k_j) v_jᵀ

`define` says it for one token and head, with numbers: scores is a list, mass is Σ_{F(i)} φφ or None without a
far part. `forward` says the same for whole blocks, under masks:

    q [..., kv, group, T, D], scores and local [..., kv, group, T, N], mass [..., kv, group, T], any_far
    broadcastable to mass -> weights like scores, coefficient like mass (None without a far part)

A new one of either is entered in `SCORES` or `COMBINES`. Shapes: heads are split as `kv, group`.
"""

import math

import torch
from torch import Tensor, nn

from linearize_kernels.features import unit_norm


def scaled_dot(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`q·k · scale`, soft-capped where the base model does so. `[.., M, D], [.., N, D] -> [.., M, N]`."""
    scores = (q * scale) @ k.transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def squared_relu(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`max(q̂·k̂, 0)²` on unit-norm vectors (FLASH, arXiv 2202.10447): the weight itself, not a logit."""
    return (unit_norm(q) @ unit_norm(k).transpose(-1, -2)).relu().square()


SCORES = {"softmax": scaled_dot, "relu2": squared_relu}


def masked_exp(scores: Tensor, keep: Tensor, ceiling: Tensor) -> Tensor:
    return (scores - ceiling[..., None]).masked_fill(~keep, float("-inf")).exp()


def finite(ceiling: Tensor) -> Tensor:
    """The row maximum, 0 where a row sees nothing (a pad)."""
    return ceiling.masked_fill(ceiling == float("-inf"), 0.0).detach()


class Shared(nn.Module):
    """One normaliser under one maximum: local weights `exp(s - m)`, far weights `exp(mix(q) - m) φφ`.

    `mix` is a learned linear function of q per head. m runs over the local scores, and over mix(q) only
    where something is far.
    """

    def __init__(self, heads: int, key_dim: int, has_local: bool, has_far: bool):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(heads, key_dim + 1)) if has_local and has_far else None

    def reset_parameters(self) -> None:
        if self.mix is not None:
            nn.init.zeros_(self.mix)

    def define(self, head, q, scores, mass, any_far):
        terms = list(scores)
        if any_far:
            mix = self.mix[head].to(q.dtype) if self.mix is not None else q.new_zeros(len(q) + 1)
            terms.append(mix[:-1] @ q + mix[-1])
        if not terms:
            return [], 0.0
        ceiling = max(terms)
        weights = [(score - ceiling).exp() for score in scores]
        far = (terms[-1] - ceiling).exp() if any_far else 0.0
        normaliser = sum(weights) + (far * mass if any_far else 0.0)
        normaliser = max(normaliser, torch.finfo(q.dtype).eps)
        return [weight / normaliser for weight in weights], far / normaliser

    def forward(
        self, q: Tensor, scores: Tensor, local: Tensor, mass: Tensor | None, any_far: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ceiling = scores.masked_fill(~local, float("-inf")).amax(-1)
        if mass is None:
            weights = masked_exp(scores, local, finite(ceiling))
            return weights / positive(weights.sum(-1))[..., None], None
        mix = mass.new_zeros(())
        if self.mix is not None:
            weight = self.mix.to(q.dtype).view(*q.shape[-4:-2], -1, 1)
            mix = (q @ weight[..., :-1, :]).squeeze(-1) + weight[..., -1, :]
        mix = torch.where(any_far, mix, float("-inf"))
        ceiling = finite(torch.maximum(ceiling, mix))
        weights, coefficient = masked_exp(scores, local, ceiling), (mix - ceiling).exp()
        normaliser = positive(weights.sum(-1) + coefficient * mass)
        return weights / normaliser[..., None], coefficient / normaliser


class Lolcats(nn.Module):
    """LoLCATs' combine (arXiv 2410.10254): local weights `γ exp(s - max s)`, far weights `φφ`, one
    normaliser. The maximum runs over the local part alone, so it is part of the meaning. γ starts at 0.1.
    """

    start = 0.1

    def __init__(self, heads: int, key_dim: int, has_local: bool, has_far: bool):
        super().__init__()
        self.gamma_logit = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma_logit, math.log(self.start / (1 - self.start)))

    def define(self, head, q, scores, mass, any_far):
        gamma = self.gamma_logit[head].to(q.dtype).sigmoid()
        weights = [gamma * (score - max(scores)).exp() for score in scores]
        normaliser = sum(weights) + (mass if any_far else 0.0)
        normaliser = max(normaliser, torch.finfo(q.dtype).eps)
        return [weight / normaliser for weight in weights], 1.0 / normaliser

    def forward(
        self, q: Tensor, scores: Tensor, local: Tensor, mass: Tensor | None, any_far: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ceiling = scores.masked_fill(~local, float("-inf")).amax(-1)
        ceiling = ceiling.masked_fill(ceiling == float("-inf"), 0.0)
        gamma = self.gamma_logit.to(q.dtype).sigmoid().view(*q.shape[-4:-2], 1, 1)
        weights = gamma * masked_exp(scores, local, ceiling)
        normaliser = positive(weights.sum(-1) + (0.0 if mass is None else mass))
        return weights / normaliser[..., None], None if mass is None else normaliser.reciprocal()


class Unnormalised(nn.Module):
    """No normaliser: the scores are the weights, and the far part counts with a learned factor per head,
    0 at the start (arXiv 2406.07368).
    """

    def __init__(self, heads: int, key_dim: int, has_local: bool, has_far: bool):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(heads)) if has_far else None

    def reset_parameters(self) -> None:
        if self.factor is not None:
            nn.init.zeros_(self.factor)

    def define(self, head, q, scores, mass, any_far):
        return list(scores), 0.0 if mass is None else self.factor[head].to(q.dtype)

    def forward(
        self, q: Tensor, scores: Tensor, local: Tensor, mass: Tensor | None, any_far: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = scores.masked_fill(~local, 0.0)
        if mass is None:
            return weights, None
        factor = self.factor.to(q.dtype).view(*q.shape[-4:-2], 1)
        return weights, factor.expand(mass.shape)


def positive(normaliser: Tensor) -> Tensor:
    return normaliser.clamp_min(torch.finfo(normaliser.dtype).eps)


COMBINES = {"shared": Shared, "lolcats": Lolcats, "none": Unnormalised}
