"""Scores of the local part. A new score is entered in `SCORES`, and in `WEIGHTS` if it is a weight and not a logit."""

import torch
from torch import Tensor

from linearize_kernels.parts.feature_maps import unit_norm
from linearize_kernels.parts.random_features import collision_probability


def scaled_dot(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute `scale q·k`, soft-capped if the base model does so: `[.., M, D], [.., N, D] -> [.., M, N]`."""
    product = torch.bmm if q.dim() == 3 else torch.matmul  # for one token, matmul takes twice as long
    scores = product(q * scale, k.mT)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def squared_relu(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute `max(q̂·k̂, 0)²` of unit-norm vectors (FLASH, arXiv 2202.10447)."""
    return (unit_norm(q) @ unit_norm(k).transpose(-1, -2)).relu().square()


def collision(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the probability that q and k fall into one bucket (YOSO-E, arXiv 2111.09714)."""
    return collision_probability(unit_norm(q) @ unit_norm(k).transpose(-1, -2))


SCORES = {"softmax": scaled_dot, "relu2": squared_relu, "yoso": collision}
WEIGHTS = ("relu2", "yoso")
