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
    """The parts of one layer's equation, with the names that recipes use, and the layer's shapes.

    For token i at position p_i, with visible tokens A(i) (itself and its ancestors, or all tokens if not
    causal):

        L(i) = { j in A(i): near(i, j) or p_j < sinks },   F(i) = A(i) minus L(i)
        near(i, j): |p_i - p_j| < size (sliding), or p_i div size == p_j div size (group)
        o_i = combine( Σ_{L(i)} κ_ij v_j, φ(q_i)ᵀ Σ_{F(i)} D_ij ω(k_j) φ(k_j) v_jᵀ ) + Σ_τ c_τ v_{anc(i,τ)}

    L(i) is the local part, with weights κ (the scores under the combine's normaliser). F(i) is the linear
    part, read through the features φ; D_ij is the decay between j and i, and ω a learned weight of key j. The
    last sum is the conv over values: anc(i, τ) is the token τ positions before i. τ runs over the last W
    tokens, or over the W tokens around i if the equation is not causal. There is no local part if size and
    sinks are 0, no linear part if feature_map is None, and no conv if conv_width is 0. Without key_weight, ω
    is 1.

    Attributes:
        heads, kv_heads: the numbers of query heads and of key-value heads.
        key_dim, value_dim: D and Dv, the sizes of a head's keys and values.
        scale: the factor of q·k in the local scores.
        softcap: the limit of a soft cap on the local scores, or None for no cap.
        bias: True if the layer learns a bias for each distance (see `LinearAttention.distance_bias`).
        causal: False for encoders, whose tokens see all others.
        scope: "sliding" (a window) or "group" (fixed blocks of positions).
        size: tokens in the window or group.
        score: the local score, a key of `local_scores.SCORES`.
        feature_map: the name of φ in `feature_maps.FEATURE_MAPS` or `far.FAR_PARTS`.
        feature_dim: the width of the features, or None for the map's default.
        per_query_head: True if keys have features, and so a state, per query head; False for one per KV head.
        key_weight: True if ω is learned.
        memory: how S forgets, a key of `decay.MEMORIES`.
        combine: how the parts are joined, a key of `combine.COMBINES`.
        conv_width: W.
        sinks: the number of attention sinks, the first tokens of a row, which are always local.
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
        """Return R, the number of recent tokens that a state keeps: the window or group, or the conv's width
        if larger.

        If the layer is not causal, R tokens are needed on either side of a chunk.
        """
        reach = self.conv_width if self.causal else max(self.size - 1, self.conv_width // 2)
        return max(self.size, reach, 0)

    @property
    def chunk(self) -> int:
        """Return the default number of tokens in a chunk: a power of two, as Triton's kernels need."""
        return min(max(32, 1 << (self.recent - 1).bit_length()), 128)

    @property
    def far_heads(self) -> int:
        """Return the number of heads of the running state (S, z), called `far` in shapes: that of query heads
        or KV heads.
        """
        return self.heads if self.per_query_head else self.kv_heads

    def near(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Compute which keys are in the window or group of which queries: `[..., T, N]` bool.

        All are False if `size` is 0. A window reaches to both sides; the caller hides tokens that come later.

        Args:
            query_position: `[..., T]`, not negative.
            key_position: `[..., N]`, not negative.
        """
        i, j = query_position[..., :, None], key_position[..., None, :]
        if self.size == 0:
            return torch.zeros_like(i - j, dtype=torch.bool)
        if self.scope == "sliding":
            return (i - j).abs() < self.size
        return i.div(self.size, rounding_mode="floor") == j.div(self.size, rounding_mode="floor")

    def to_far_heads(self, x: Tensor, dim: int = -3) -> Tensor:
        """Repeat KV heads (dimension `dim`) to the number of heads of S:
        `[..., kv, T, X] -> [..., far, T, X]`.
        """
        repeats = self.far_heads // self.kv_heads
        return x if repeats == 1 else x.repeat_interleave(repeats, dim)

    def fold_queries(self, x: Tensor, heads: int) -> Tensor:
        """Join the query heads that read the same head of S or of the keys:
        `[.., heads, T, X] -> [.., h, group * T, X]`.

        `heads` is h, the number of heads that are read; group is the number of query heads for each of them.
        """
        return x.reshape(*x.shape[:-3], heads, -1, x.shape[-1])

    def split_queries(self, x: Tensor, length: int) -> Tensor:
        """Undo `fold_queries`, with T = `length`: `[..., h, group * T, X] -> [..., h, group, T, X]`."""
        return x.unflatten(-2, (-1, length))


class LinearAttention(nn.Module):
    """The parameters of one layer's equation: linear part, combine, conv and position bias.

    Functions compute its outputs: `chunked` over a long sequence, `varlen` over packed sequences,
    `bidirectional` in an encoder, `block` for any equation, and `step` (the definition) for one token.

    Attributes:
        equation: the parts and shapes.
        score: the function that computes the local scores.
        dropped: for ablations, the part that is removed from both the numerator and the normaliser: "local",
            "far", or None for neither.
        impl: the requested implementation of the chunked forms: "auto" (Triton on a GPU where its kernels can
            run, else torch), "torch" or "triton". "triton" raises ValueError where no kernel can run.
        ran: the implementation that was used last: "triton", "torch", "block" (the slow reference, which
            computes any equation), or None before the first call.
        far: the linear part, or None if the equation has none. It is a `FeatureMemory` or a class in
            `far.FAR_PARTS`.
        combine: the module that joins the local and the linear part.
        conv: the conv's weights `[heads, W]`, or None.
        distance_bias: the bias that is added to the local score of tokens i and j, or None. It is
            `[heads, size]`, read at p_i - p_j. If the equation is not causal, it is `[heads, 2 size - 1]`,
            read at p_i - p_j + size - 1. Distances outside of the table, which only sinks have, take its
            nearest entry.
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
        """Make the state before the first token of `batch` rows. `dtype` is the dtype of k and v."""
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
    """Return the dtype in which inputs of a dtype are summed: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
