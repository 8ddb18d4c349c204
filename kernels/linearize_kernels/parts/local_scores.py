"""Scores of the local part, `[..., M, N]` for queries `[..., M, D]` and keys `[..., N, D]`.

A new score is entered in `SCORES`, and in `WEIGHTS` if it is a weight itself and not the logit of a softmax.
"""

import torch
from torch import Tensor

from linearize_kernels.parts.feature_maps import unit_norm
from linearize_kernels.parts.random_features import collision_probability


def scaled_dot(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the logits `scale q·k` of softmax, `[.., M, N]`.

    Args:
        q: `[.., M, D]`.
        k: `[.., N, D]`.
        softcap: c of the soft cap `c tanh(score / c)`, or None for no cap.
    """
    product = torch.bmm if q.dim() == 3 else torch.matmul  # for one token, matmul takes twice as long
    scores = product(q * scale, k.mT)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def squared_relu(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the weights `max(q̂·k̂, 0)²` of q and k at unit norm (FLASH, arXiv 2202.10447).

    scale and softcap are not used.
    """
    return (unit_norm(q) @ unit_norm(k).transpose(-1, -2)).relu().square()


def collision(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the probability that random hashing puts q and k into one bucket, as a weight (YOSO-E, arXiv
    2111.09714).

    scale and softcap are not used.
    """
    return collision_probability(unit_norm(q) @ unit_norm(k).transpose(-1, -2))


SCORES = {"softmax": scaled_dot, "relu2": squared_relu, "yoso": collision}
WEIGHTS = ("relu2", "yoso")
