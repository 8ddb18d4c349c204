"""Feature maps whose directions are drawn, not learned."""

import math

import torch
from torch import Tensor

from linearize_kernels.parts.feature_maps import FeatureMap, feature_map, unit_norm


@feature_map("performer")
class Performer(FeatureMap):
    """FAVOR+: `exp(ωᵀx - |x|²/2) / √m` of `x = √scale x` with m orthogonal random directions ω of Gaussian length
    (arXiv 2009.14794, eqs. 5 to 7 and sec. 2.4); φφ is an unbiased estimate of `exp(scale q·k)`. ω is drawn from
    torch's generator, saved with the weights and not trained; `redraw` draws it anew. In fp32 the features vanish
    where `scale |x|²` is beyond about 100: there is no stabiliser, which would have to know later keys.
    """

    directions: Tensor
    positive = True
    shared = True

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None, scale: float = 1.0):
        super().__init__(heads, head_dim, feature_dim, scale)
        self.feature_dim = feature_dim or 2 * head_dim
        self.register_buffer("directions", torch.empty(head_dim, self.feature_dim))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw the directions: blocks of D orthogonal ones, each with the length of a Gaussian vector."""
        count, dim = self.feature_dim, self.head_dim
        blocks = -(-count // dim)
        orthogonal, triangle = torch.linalg.qr(torch.randn(blocks, dim, dim, generator=generator))
        orthogonal = orthogonal * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]  # else not uniform (Haar)
        lengths = torch.randn(blocks * dim, dim, generator=generator).norm(dim=-1)
        self.directions.copy_((orthogonal.transpose(1, 2).reshape(-1, dim) * lengths[:, None])[:count].T)

    reset_parameters = redraw

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale**0.5
        exponent = x @ self.directions.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.feature_dim)


@feature_map("yoso")
class Yoso(FeatureMap):
    """YOSO's locality-sensitive hashing (arXiv 2111.09714, sec. 3): the signs of BITS random hyperplanes put a
    vector in one of 2^BITS buckets, and φ is 1/√m in its bucket of each of m hashes. φφ is the share of hashes
    that collide, of expectation `collision_probability`.

    The gradient is that of the expectation in the paper's bounded form (eq. 12), `BITS/2 · φφ · k` towards q, with
    the direction of k's bucket in the place of k, as long as gives k·k = 1 in the mean: so it, too, needs no more
    than the state.
    """

    planes: Tensor
    positive = True
    shared = True

    def __init__(self, heads: int, head_dim: int, feature_dim: int | None = None, scale: float = 1.0):
        super().__init__(heads, head_dim, feature_dim, scale)
        self.hashes = max(1, (feature_dim or 8 << BITS) >> BITS)
        self.feature_dim = self.hashes << BITS
        self.register_buffer("planes", torch.empty(head_dim, self.hashes, BITS))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        self.planes.copy_(torch.randn(self.planes.shape, generator=generator))

    reset_parameters = redraw

    def forward(self, x: Tensor) -> Tensor:
        x = unit_norm(x)
        planes = self.planes.to(x.dtype)
        planes = planes / planes.norm(dim=0)
        height = (x @ planes.flatten(1)).unflatten(-1, (self.hashes, BITS))
        above = height.detach() > 0
        bucket = (above * (1 << torch.arange(BITS, device=x.device))).sum(-1)
        # |height| is √(2/πD) in the mean, so this is 1 in the mean.
        along = math.sqrt(math.pi * self.head_dim / 2) * torch.where(above, height, -height).mean(-1)
        collides = (1 + BITS / 2 * (along - along.detach())) / math.sqrt(self.hashes)
        buckets = torch.arange(1 << BITS, device=x.device)
        return ((bucket[..., None] == buckets) * collides[..., None]).flatten(-2)


BITS = 4


def collision_probability(cosine: Tensor) -> Tensor:
    """Compute `(1 - arccos(q̂·k̂)/π)^BITS` (YOSO, arXiv 2111.09714, eq. 6).

    Its gradient is the paper's bounded one, `BITS/2` times the value: the exact gradient diverges at cosine 1.
    """
    value = (1 - torch.arccos(cosine.detach().clamp(-1, 1)) / math.pi) ** BITS
    return value * (1 + BITS / 2 * (cosine - cosine.detach()))
