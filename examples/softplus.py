"""An example of a new feature map. The recipe softplus.yaml uses it, and artifacts carry a copy of this file."""

from linearize_kernels.parts.feature_maps import Projected, feature_map
from torch import Tensor
from torch.nn.functional import softplus


@feature_map("softplus")
class Softplus(Projected):
    """The feature map `log(1 + exp(Wᵀx))`, with one learned W per head."""

    positive = True  # φ(q)·φ(k) is never negative, so it may share the local part's normaliser

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.feature_dim = self.weight.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the features `[..., heads, T, F]` of queries or keys `[..., heads, T, D]`."""
        return softplus(x @ self.weight.to(x.dtype))
