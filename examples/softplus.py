"""A new feature map, for the recipe beside it, softplus.yaml, to name. It travels inside the artifacts made with it."""

from linearize_kernels.parts.feature_maps import Projected, feature_map
from torch import Tensor
from torch.nn.functional import softplus


@feature_map("softplus")
class Softplus(Projected):
    """`log(1 + exp(Wᵀx))`, one learned W per head: `[..., heads, T, D] -> [..., heads, T, F]`."""

    positive = True  # its φφ are weights, so that it may share the local part's normaliser

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.feature_dim = self.weight.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return softplus(x @ self.weight.to(x.dtype))
