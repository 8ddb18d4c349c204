"""Feature maps with random directions, which are not trained."""

import math

import torch
from torch import Tensor

from linearize_kernels.parts.feature_maps import FeatureMap, feature_map, unit_norm


@feature_map("performer")
class Performer(FeatureMap):
    """FAVOR+ (arXiv 2009.14794, eqs. 5 to 7 and sec. 2.4): φ(x) = `exp(ωᵀy - |y|²/2) / √m` with
    `y = √scale x`.

    There are m random directions ω, orthogonal and with the lengths of Gaussian vectors. φ(q)·φ(k) is an
    unbiased estimate of `exp(scale q·k)`. ω is sampled from torch's generator and saved with the weights, and
    not trained. `redraw` samples it again. In fp32 the features underflow to zero if `scale |x|²` is above
    about 100. The paper's stabiliser is not used, because it depends on later keys.
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
        """Sample the directions in blocks of D orthogonal ones, each with the length of a Gaussian vector.

        Args:
            generator: the random generator, or None for torch's global one.
        """
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
    """YOSO's locality-sensitive hashing (arXiv 2111.09714, sec. 3).

    One hash puts a vector in one of 2^BITS buckets, by the signs of its products with BITS random vectors.
    For each of m hashes, φ is 1/√m at the vector's bucket and 0 at the others. φ(q)·φ(k) is the share of
    hashes that put q and k in the same bucket. Its expectation is `collision_probability`.

    The backward uses the paper's bounded gradient of that expectation (eq. 12): for q it is
    `BITS/2 · φ(q)·φ(k) · k`. Here k is replaced by the mean direction of its bucket, scaled so that its
    expected product with k is 1. That depends on k only through φ(k), so the backward needs no stored keys
    either.
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
        """Sample the hyperplanes from a generator, or from torch's global one if it is None."""
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
    """Compute `(1 - arccos(cosine)/π)^BITS`, the probability that BITS random hyperplanes do not separate two
    vectors.

    This is eq. 6 of YOSO (arXiv 2111.09714). The gradient is the paper's bounded one, `BITS/2` times the
    value, because the exact gradient diverges at cosine 1.

    Args:
        cosine: the cosine of the two vectors, of any shape.
    """
    value = (1 - torch.arccos(cosine.detach().clamp(-1, 1)) / math.pi) ** BITS
    return value * (1 + BITS / 2 * (cosine - cosine.detach()))
