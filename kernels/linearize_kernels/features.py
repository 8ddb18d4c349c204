"""Feature maps φ of the far part: `φ(q)ᵀ φ(k)` stands in for the softmax kernel.

Each is a module over `[..., heads, T, D] -> [..., heads, T, feature_dim]`. A new one is a class with
`feature_dim` and `forward`, entered in `FEATURE_MAPS`.
"""

import torch
from torch import Tensor, nn


def unit_norm(x: Tensor) -> Tensor:
    """`x / |x|` over the last dimension; a zero vector stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)


class Identity(nn.Module):
    """The vector itself at unit norm (FLASH, arXiv 2202.10447, as arXiv 2406.07368 uses it)."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return unit_norm(x)


class Relu(nn.Module):
    """`max(x, 0)` (EfficientViT, arXiv 2205.14756)."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Hedgehog(nn.Module):
    """`[softmax(xW), softmax(-xW)]`, one learned W per head (arXiv 2402.04347, in the softmax form of
    arXiv 2410.10254). `feature_dim` is W's width; the features are twice as many.
    """

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__()
        width = feature_dim or head_dim
        self.feature_dim = 2 * width
        self.weight = nn.Parameter(torch.empty(heads, head_dim, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity; columns beyond the head size are random directions of the same length."""
        heads, head_dim, width = self.weight.shape
        directions = torch.randn(heads, head_dim, width)
        self.weight.copy_(directions / directions.norm(dim=1, keepdim=True))
        square = min(head_dim, width)
        self.weight[:, :, :square] = torch.eye(head_dim, square)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight.to(x.dtype)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


FEATURE_MAPS = {"identity": Identity, "relu": Relu, "hedgehog": Hedgehog}
