"""Feature maps φ of the linear part: `φ(q)ᵀ φ(k)` replaces softmax's `exp(scale q·k)`.

A feature map is a module that maps `[..., heads, T, D]` to `[..., heads, T, feature_dim]`. A new one is a
subclass of `FeatureMap` with the decorator `@feature_map(name)`. Maps with random directions are in
`random_features`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

FEATURE_MAPS: dict[str, type["FeatureMap"]] = {}


def feature_map(name: str) -> Callable[[type["FeatureMap"]], type["FeatureMap"]]:
    """Return a decorator that registers a class in `FEATURE_MAPS` under the name that recipes use."""

    def enter(cls: type["FeatureMap"]) -> type["FeatureMap"]:
        cls.name, FEATURE_MAPS[name] = name, cls
        return cls

    return enter


def unit_norm(x: Tensor) -> Tensor:
    """Return `x / |x|` over the last dimension; a zero vector stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)


class FeatureMap(nn.Module):
    """The base class of feature maps. A map must be deterministic, because the backward may recompute the
    features.

    Args:
        heads: number of heads of the queries or keys.
        head_dim: size of a head.
        feature_dim: the width that the recipe asks for, or None for the map's own choice.
        scale: the scale of the softmax `exp(scale q·k)` that the map approximates.

    Attributes:
        feature_dim: width of the output.
        name: its name in recipes.
        positive: True if `φ(q)ᵀ φ(k)` is never negative. A normaliser shared by the local and linear part
            needs that.
        shared: True if queries and keys must use one map with the same parameters.
    """

    name: str
    positive = False
    shared = False

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None, scale: float = 1.0):
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, scale
        self.feature_dim = head_dim

    def one_token(self, x: Tensor) -> Tensor:
        """Return the features of one token of B rows, `[heads, B, D] -> [heads, B, F]`."""
        return self(x)

    def reset_parameters(self) -> None:
        """Set all parameters to their values at the start of a conversion."""

    def estimate_softmax(self) -> float:
        """Initialize the weights so that `φ(q)ᵀ φ(k)` estimates the softmax weight `exp(scale q·k)`, up to a factor.

        `scale` is that of the layer's softmax logits. A map that cannot estimate it does not change.

        Returns:
            the factor: `φ(q)ᵀ φ(k) ≈ factor · exp(scale q·k)`. 1 if the map does not change.
        """
        return 1.0


@feature_map("identity")
class Identity(FeatureMap):
    """φ(x) = x / |x|, the vector at unit norm (FLASH, arXiv 2202.10447, as arXiv 2406.07368 uses it)."""

    def forward(self, x: Tensor) -> Tensor:
        return unit_norm(x)


@feature_map("linear")
class Linear(FeatureMap):
    """φ(x) = √scale x, so that φ(q)·φ(k) is the logit `scale q·k` of softmax (retention, arXiv 2307.08621,
    eq. 5).
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale**0.5


@feature_map("relu")
class Relu(FeatureMap):
    """φ(x) = `max(x, 0)` (EfficientViT, arXiv 2205.14756)."""

    positive = True

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


@feature_map("silu")
class Silu(FeatureMap):
    """φ(x) = `x sigmoid(x)` (MiniMax-01, arXiv 2501.08313)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)


@feature_map("elu")
class Elu(FeatureMap):
    """φ(x) = `1 + elu(x)` (arXiv 2006.16236, eq. 7), which TransNormer uses too (arXiv 2210.10340)."""

    positive = True

    def forward(self, x: Tensor) -> Tensor:
        return 1 + nn.functional.elu(x)


class Projected(FeatureMap):
    """The base class of maps that first multiply x by a learned matrix W per head,
    `[heads, D, feature_dim or D]`.
    """

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None, scale: float = 1.0):
        super().__init__(heads, head_dim, feature_dim, scale)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim or head_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set W to the identity. Columns beyond the head size D become random unit vectors, the same for all
        heads.
        """
        heads, head_dim, width = self.weight.shape
        directions = torch.randn(head_dim, width)
        self.weight.copy_(directions / directions.norm(dim=0))
        square = min(head_dim, width)
        self.weight[:, :, :square] = torch.eye(head_dim, square)


@feature_map("hedgehog")
class Hedgehog(Projected):
    """φ(x) = `[softmax(xW), softmax(-xW)]` with a learned W per head (arXiv 2402.04347, softmax as in arXiv
    2410.10254).

    The recipe's `feature_dim` is the number of columns of W. There are twice as many features.
    """

    positive = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.feature_dim = 2 * self.weight.shape[-1]

    @torch.no_grad()
    def estimate_softmax(self) -> float:
        """Scale the projection `weight` so that `φ(q)ᵀ φ(k) ≈ factor · exp(scale q·k)`, and return the factor."""
        self.weight.mul_(math.sqrt(self.scale * self.head_dim))
        return 4 / self.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight.to(x.dtype)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    def one_token(self, x: Tensor) -> Tensor:
        if type(self) is not Hedgehog:  # a subclass may have a formula of its own
            return super().one_token(x)
        heads, batch, _ = x.shape
        x = torch.bmm(x, self.weight.to(x.dtype))
        return torch.cat([x, -x], -1).view(heads, batch, 2, -1).softmax(-1).view(heads, batch, -1)


@feature_map("taylor")
class Taylor(Projected):
    """φ(x) = `[1, y, y⊗y/√2]` with `y = √scale Wᵀx` (Based, arXiv 2402.18668, sec. 4).

    φ(q)·φ(k) is the second-order Taylor series of the exponential. The recipe's `feature_dim` is d', the
    number of columns of W. There are 1 + d' + d'² features.
    """

    positive = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        width = self.weight.shape[-1]
        self.feature_dim = 1 + width + width * width

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale**0.5 * (x @ self.weight.to(x.dtype))
        squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)
