"""Linear attention of a decoder to an encoder: every token of the source is far, and read through a feature map
(arXiv 2406.07368).
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
    """Holds S `[B, far, F, Dv]` and z `[B, far, F]` of the source. Models read the length of its keys and values:
    these are zeros that take no memory.
    """

    def __init__(self):
        super().__init__()
        self.state: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (x.new_zeros(()).expand_as(x) for x in (key_states, value_states))
        return key_states, value_states

    def reset(self) -> None:
        super().reset()
        self.state = None

    def nbytes(self) -> int:
        """Bytes of the state; 0 before the first token."""
        return 0 if self.state is None else sum(x.nbytes for x in self.state)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(map(function, self.state))
            rows = self.state[0].shape[0]
            self.keys, self.values = (x[:1].expand(rows, *x.shape[1:]) for x in (self.keys, self.values))


class LinearizedCrossAttention(LinearAttention):
    """`o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)` over the tokens j of the source. The equation has a
    feature map and no other part.
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
        """Map query `[B, heads, T, D]`, key and value `[B, kv, N, D]` to `[B, T, heads, Dv]` in query's dtype.

        Args:
            attention_mask: `[B, 1, T, N]`, boolean or additive, from which the source's pads are read; None: none.
            linearize_state: the layer's place in the cache; once it holds a source, key and value are not read.
        """
        state = None if linearize_state is None else linearize_state.state
        with loaded(self):
            if state is None:
                state = self.read(key, value, attention_mask)
            if linearize_state is not None:
                linearize_state.state = state
            return cross(self, query, *state).transpose(1, 2).contiguous()

    def read(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return S and z of the source.

        Raises:
            ValueError: the mask hides tokens of the source from some queries only.
        """
        if mask is None:
            return encode(self, key, value)
        seen = shown(mask)
        if not torch.compiler.is_compiling() and not bool((seen == seen[:, :1, :1]).all()):
            raise ValueError(
                "a linear attention to an encoder cannot follow this 4-D attention mask: it takes one that hides the "
                "same tokens of the encoder from every query and head"
            )
        return encode(self, key, value, seen[:, 0, 0].expand(key.shape[0], -1))

    def place(self, cache: EncoderDecoderCache, index: int) -> CrossCacheLayer:
        """Return the cache's layer for the source, turned into a `CrossCacheLayer` while it is still empty.

        Raises:
            RuntimeError: the layer holds something else already.
        """
        cache = cache.cross_attention_cache
        layer = grown(cache, index)
        if not isinstance(layer, CrossCacheLayer):
            check_empty(layer, index)
            layer = cache.layers[index] = CrossCacheLayer()
        return layer


def cross_equation(attention: dict, geometry: dict) -> Equation:
    """The equation of a cross-attention: the recipe's feature map alone."""
    far = attention["far"]
    names = ("heads", "kv_heads", "key_dim", "value_dim", "scale")
    return Equation(
        **{name: geometry[name] for name in names},
        feature_map=far["feature_map"],
        feature_dim=far.get("feature_dim"),
        per_query_head=far.get("per_query_head", False),
        key_weight=far.get("key_weight", False),
    )
