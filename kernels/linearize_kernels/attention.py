"""The parts of one layer's equation, with their learned parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize_kernels.features import FEATURE_MAPS
from linearize_kernels.local import COMBINES, SCORES
from linearize_kernels.state import State


@dataclass(frozen=True)
class Equation:
    """One layer's choice of parts (the names are a recipe's) and its geometry.

    For token i at position p_i, with visible tokens A(i) (itself and its ancestors):

        L(i) = { j in A(i): near(i, j) or p_j < sinks },   F(i) = A(i) minus L(i)
        near(i, j): p_i - p_j < size (sliding), or p_i div size == p_j div size (group)
        o_i = Σ_{L(i)} weight_ij v_j + coefficient_i φ(q_i)ᵀ Σ_{F(i)} φ(k_j) v_jᵀ + Σ_{τ<W} c_τ v_{anc(i,τ)}

    size 0 means no local part; feature_map None no far part; conv_width 0 no conv.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    scope: str = "sliding"
    size: int = 0
    score: str = "softmax"
    feature_map: str | None = None
    feature_dim: int | None = None
    per_query_head: bool = False
    combine: str = "shared"
    conv_width: int = 0
    sinks: int = 0

    @property
    def recent(self) -> int:
        """Tokens kept as they are: the near part, or the conv's reach where that is longer."""
        return max(self.size, self.conv_width - 1, 0)

    @property
    def far_heads(self) -> int:
        return self.heads if self.per_query_head else self.kv_heads

    def near(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """`[..., T], [..., N] -> [..., T, N]` bool; positions are not negative."""
        i, j = query_position[..., :, None], key_position[..., None, :]
        if self.size == 0:
            return torch.zeros_like(i - j, dtype=torch.bool)
        if self.scope == "sliding":
            return i - j < self.size
        return i.div(self.size, rounding_mode="floor") == j.div(self.size, rounding_mode="floor")


class LinearAttention(nn.Module):
    """The learned parts of one layer: feature maps, combine and conv. `block`, `advance`, `chunked` and
    `step` evaluate them.

    `dropped` names a part that is left out, of the normaliser too: "local", "far" or None (ablations).
    """

    def __init__(self, equation: Equation):
        super().__init__()
        self.equation, self.dropped = equation, None
        self.score = SCORES[equation.score]
        self.q_map = self.k_map = None
        if equation.feature_map is not None:
            feature_map = FEATURE_MAPS[equation.feature_map]
            self.q_map = feature_map(equation.heads, equation.key_dim, equation.feature_dim)
            self.k_map = feature_map(equation.far_heads, equation.key_dim, equation.feature_dim)
        has_local = equation.size > 0 or equation.sinks > 0
        combine = COMBINES[equation.combine]
        self.combine = combine(equation.heads, equation.key_dim, has_local, self.q_map is not None)
        conv = torch.zeros(equation.heads, equation.conv_width)
        self.conv = nn.Parameter(conv) if equation.conv_width else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every learned part as at the start of a conversion."""
        if self.conv is not None:
            nn.init.zeros_(self.conv)
        for part in (self.q_map, self.k_map, self.combine):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def key_features(self, k: Tensor) -> Tensor:
        """`[..., kv, T, D] -> [..., far, T, F]`."""
        eq = self.equation
        return self.k_map(k.repeat_interleave(eq.far_heads // eq.kv_heads, dim=-3))

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token; `dtype` is that of k and v."""
        eq = self.equation
        features = 0 if self.k_map is None else self.k_map.feature_dim

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        wide = accumulator(dtype)
        return State(
            S=zeros(eq.far_heads, features, eq.value_dim, dtype=wide),
            z=zeros(eq.far_heads, features, dtype=wide),
            sink_k=zeros(eq.kv_heads, eq.sinks, eq.key_dim),
            sink_v=zeros(eq.kv_heads, eq.sinks, eq.value_dim),
            recent_k=zeros(eq.kv_heads, eq.recent, eq.key_dim),
            recent_v=zeros(eq.kv_heads, eq.recent, eq.value_dim),
            recent_position=zeros(eq.recent, dtype=torch.int64) - 1,
            count=zeros(dtype=torch.int64),
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
