"""The parts of one layer's equation, with their learned parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize_kernels.parts.combine import COMBINES, Combine
from linearize_kernels.parts.far import FeatureMemory, far_part
from linearize_kernels.parts.local_scores import SCORES
from linearize_kernels.state import State


@dataclass(frozen=True)
class Equation:
    """Parts of one layer (with the names of recipes) and its geometry.

    For token i at position p_i, with visible tokens A(i) (itself and its ancestors; not causal: all tokens):

        L(i) = { j in A(i): near(i, j) or p_j < sinks },   F(i) = A(i) minus L(i)
        near(i, j): |p_i - p_j| < size (sliding), or p_i div size == p_j div size (group)
        o_i = combine( Σ_{L(i)} κ_ij v_j, φ(q_i)ᵀ Σ_{F(i)} D_ij ω(k_j) φ(k_j) v_jᵀ ) + Σ_τ c_τ v_{anc(i,τ)}

    τ runs over the last W tokens, or over the W tokens around i if the equation is not causal. There is no local part
    if size is 0, no far part if feature_map is None, and no conv if conv_width is 0. Without key_weight, ω is 1.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    bias: bool = False
    causal: bool = True
    scope: str = "sliding"
    size: int = 0
    score: str = "softmax"
    feature_map: str | None = None
    feature_dim: int | None = None
    per_query_head: bool = False
    key_weight: bool = False
    memory: str = "none"
    combine: str = "shared"
    conv_width: int = 0
    sinks: int = 0

    @property
    def recent(self) -> int:
        """Return the number of recent tokens that a state keeps: the window or group, or the conv's width if larger.

        If the layer is not causal, it is the number of such tokens on either side.
        """
        reach = self.conv_width if self.causal else max(self.size - 1, self.conv_width // 2)
        return max(self.size, reach, 0)

    @property
    def chunk(self) -> int:
        """Return the default number of tokens in a chunk: a power of two, as Triton's kernels need."""
        return min(max(32, 1 << (self.recent - 1).bit_length()), 128)

    @property
    def far_heads(self) -> int:
        return self.heads if self.per_query_head else self.kv_heads

    def near(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Compute which keys are near which queries, `[..., T], [..., N] -> [..., T, N]` bool.

        Positions are not negative.
        """
        i, j = query_position[..., :, None], key_position[..., None, :]
        if self.size == 0:
            return torch.zeros_like(i - j, dtype=torch.bool)
        if self.scope == "sliding":
            return (i - j).abs() < self.size
        return i.div(self.size, rounding_mode="floor") == j.div(self.size, rounding_mode="floor")

    def to_far_heads(self, x: Tensor, dim: int = -3) -> Tensor:
        """Repeat KV heads as S has them: `[..., kv, T, X] -> [..., far, T, X]`."""
        repeats = self.far_heads // self.kv_heads
        return x if repeats == 1 else x.repeat_interleave(repeats, dim)

    def fold_queries(self, x: Tensor, heads: int) -> Tensor:
        """Group query heads by the heads that they read: `[..., heads, T, X] -> [..., h, group * T, X]`."""
        return x.reshape(*x.shape[:-3], heads, -1, x.shape[-1])

    def split_queries(self, x: Tensor, length: int) -> Tensor:
        """Split the query heads of a group: `[..., h, group * T, X] -> [..., h, group, T, X]`."""
        return x.unflatten(-2, (-1, length))


class LinearAttention(nn.Module):
    """Parameters of one layer: far part, combine, conv and position bias.

    `block`, `chunked`, `varlen`, `bidirectional` and `step` compute its outputs.

    Attributes:
        dropped: a part that is left out, of the normaliser too: "local", "far" or None (ablations).
        impl: the implementation of chunks: "auto" (Triton on a GPU where its kernels can run, else torch), "torch" or
            "triton", which raises where it cannot run.
        ran: the implementation that computed last: "triton", "torch" (a chunked form), "block" (any equation) or None.
        far: the far part, or None. It may also be one of `far.FAR_PARTS`, which have the same methods for blocks and
            for one token.
        conv: `[heads, W]`, or None.
        distance_bias: `[heads, size]`, added to the local score at distance p_i - p_j, or None. If the equation is not
            causal, `[heads, 2 size - 1]`, at p_i - p_j + size - 1. Longer distances (sinks) take the last one.
    """

    dropped: str | None
    impl: str
    ran: str | None
    far: FeatureMemory | None
    combine: Combine
    conv: nn.Parameter | None
    distance_bias: nn.Parameter | None

    def __init__(self, equation: Equation):
        super().__init__()
        self.equation, self.dropped, self.impl, self.ran = equation, None, "auto", None
        self.score = SCORES[equation.score]
        self.far = None if equation.feature_map is None else far_part(equation)
        has_local = equation.size > 0 or equation.sinks > 0
        combine = COMBINES[equation.combine]
        geometry = (equation.heads, equation.key_dim, equation.value_dim)
        self.combine = combine(*geometry, has_local, self.far is not None)
        conv = torch.empty(equation.heads, equation.conv_width)
        self.conv = nn.Parameter(conv) if equation.conv_width else None
        distances = max(equation.size if equation.causal else 2 * equation.size - 1, 1)
        bias = torch.empty(equation.heads, distances)
        self.distance_bias = nn.Parameter(bias) if equation.bias and has_local else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters to their values at the start of a conversion."""
        for parameter in (self.conv, self.distance_bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.far is not None:
            self.far.reset_parameters()
        self.combine.reset_parameters()

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """Make the state before the first token; `dtype` is that of k and v."""
        eq = self.equation
        features, width = (0, eq.value_dim) if self.far is None else self.far.state_width

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        wide = accumulator(dtype)
        return State(
            S=zeros(eq.far_heads, features, width, dtype=wide),
            z=zeros(eq.far_heads, features, dtype=wide),
            sink_k=zeros(eq.kv_heads, eq.sinks, eq.key_dim),
            sink_v=zeros(eq.kv_heads, eq.sinks, eq.value_dim),
            recent_k=zeros(eq.kv_heads, eq.recent, eq.key_dim),
            recent_v=zeros(eq.kv_heads, eq.recent, eq.value_dim),
            recent_position=zeros(eq.recent, dtype=torch.int64) - 1,
            count=zeros(dtype=torch.int64),
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
