"""Linear cross-attention of a decoder to an encoder (arXiv 2406.07368).

All tokens of the source belong to the linear part, which reads them through a feature map.
"""

from collections.abc import Callable

import torch
from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.ops.cross_attention import cross, encode
from torch import Tensor
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from linearize_cli.runtime.cache import MappedRows
from linearize_cli.runtime.masks import shown
from linearize_cli.runtime.offload import loaded
from linearize_cli.runtime.places import check_empty, grown


class CrossCacheLayer(MappedRows, DynamicLayer):
    """The cache of a linear cross-attention: the state of the source (the encoder's tokens).

    Models also read the length of the cache's keys and values. These are zeros expanded to the right shape,
    which use no memory.

    Attributes:
        state: S `[B, far, F, Dv]` and z `[B, far, F]` of the source, or None before the first forward. `far`
            is the number of heads of S.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store the length of the source, and return its keys and values unchanged. The state is set by the
        attention.
        """
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (x.new_zeros(()).expand_as(x) for x in (key_states, value_states))
        return key_states, value_states

    def reset(self) -> None:
        """Delete the state."""
        super().reset()
        self.state = None

    def nbytes(self) -> int:
        """Return the bytes of the state, or 0 before the source was read."""
        return 0 if self.state is None else sum(x.nbytes for x in self.state)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function that selects or reorders the rows (first dimension) to the state."""
        if self.state is not None:
            S, z = map(function, self.state)
            self.state = S, z
            if self.keys is not None and self.values is not None:
                self.keys, self.values = (
                    x[:1].expand(S.shape[0], *x.shape[1:]) for x in (self.keys, self.values)
                )


class LinearizedCrossAttention(LinearAttention):
    """Linear cross-attention to the tokens j of a source.

    The output is `o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)`. Its equation has a feature map and no
    local part, decay or conv.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        linearize_state: CrossCacheLayer | None = None,
        **unused: object,
    ) -> Tensor:
        """Compute the attention of a decoder's tokens to the source.

        Args:
            query: `[B, heads, T, D]`.
            key, value: the source, `[B, kv, N, D]` and `[B, kv, N, Dv]`. They are not used if the cache holds
                the state of a source already.
            attention_mask: `[B, 1, T, N]`, boolean or additive, which hides the source's pads. None means no
                pads.
            linearize_state: the layer's cache, or None without a cache.

        Returns:
            `[B, T, heads, Dv]` in query's dtype.

        Raises:
            ValueError: the mask hides tokens of the source from some queries only.
        """
        state = None if linearize_state is None else linearize_state.state
        with loaded(self):
            if state is None:
                state = self.read(key, value, attention_mask)
            if linearize_state is not None:
                linearize_state.state = state
            return cross(self, query, *state).transpose(1, 2).contiguous()

    def read(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the state of the source: S `[B, far, F, Dv]` and z `[B, far, F]`.

        Args:
            key, value: the source, `[B, kv, N, D]` and `[B, kv, N, Dv]`.
            mask: `[B, 1, T, N]`, boolean or additive, which hides pads, or None.

        Raises:
            ValueError: the mask hides tokens of the source from some queries only.
        """
        if mask is None:
            return encode(self, key, value)
        seen = shown(mask)
        if not torch.compiler.is_compiling() and not bool((seen == seen[:, :1, :1]).all()):
            raise ValueError(
                "linear cross-attention cannot follow this 4-D attention mask: it takes one that hides the "
                "same tokens of the encoder from every query and head"
            )
        return encode(self, key, value, seen[:, 0, 0].expand(key.shape[0], -1))

    def place(self, cache: EncoderDecoderCache, index: int) -> CrossCacheLayer:
        """Return the cross-attention layer `index` of a cache. An empty one is replaced by a
        `CrossCacheLayer`.

        Raises:
            RuntimeError: the layer holds keys and values, or the state of another copy of this code.
        """
        sources = cache.cross_attention_cache
        layer = grown(sources, index)
        if not isinstance(layer, CrossCacheLayer):
            check_empty(layer, index)
            layer = sources.layers[index] = CrossCacheLayer()
        return layer


def cross_equation(attention: dict, geometry: dict) -> Equation:
    """Return the equation of a cross-attention, which uses only the feature map of the recipe.

    Args:
        attention: the `attention` section of a recipe.
        geometry: the sizes of the base model's layer.
    """
    far = attention["far"]
    names = ("heads", "kv_heads", "key_dim", "value_dim", "scale")
    return Equation(
        **{name: geometry[name] for name in names},
        feature_map=far["feature_map"],
        feature_dim=far.get("feature_dim"),
        per_query_head=far.get("per_query_head", False),
        key_weight=far.get("key_weight", False),
    )
