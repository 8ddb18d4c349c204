"""The attention of a converted layer: it handles masks, pads, packed documents and the cache around the
equation.
"""

from math import inf

import torch
from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.ops.bidirectional import bidirectional
from linearize_kernels.ops.chunked import chunked
from linearize_kernels.ops.varlen import packed_plan
from torch import Tensor
from transformers.cache_utils import Cache

from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.cross import LinearizedCrossAttention, cross_equation
from linearize_cli.runtime.masks import (
    exporting,
    is_compact,
    is_document_mask,
    masked_documents,
    starts_of,
    valid_tokens,
)
from linearize_cli.runtime.offload import loaded
from linearize_cli.runtime.packed import attend_apart, attend_packed, document_starts
from linearize_cli.runtime.places import cache_layer

NO_PAGES = (
    "continuous batching (generate_batch, serve --continuous-batching) pages keys and values, and a linearized model "
    "keeps a state: use model.generate()"
)


def equation(attention: dict, geometry: dict) -> Equation:
    """Return the equation of one layer.

    Args:
        attention: the `attention` section of a recipe.
        geometry: the sizes of the base model's layer, as the arguments `heads` to `causal` of `Equation`.
    """
    local, far = attention.get("local") or {}, attention.get("far") or {}
    return Equation(
        **geometry,
        scope=local.get("scope", "sliding"),
        size=local.get("size", 0),
        score=local.get("score", "softmax"),
        feature_map=far.get("feature_map"),
        feature_dim=far.get("feature_dim"),
        per_query_head=far.get("per_query_head", False),
        key_weight=far.get("key_weight", False),
        memory=(attention.get("memory") or {}).get("kind", "none"),
        combine=attention.get("combine", "none"),
        conv_width=(attention.get("conv") or {}).get("width", 0),
        sinks=attention.get("sinks", 0),
    )


class LinearizedAttention(LinearAttention):
    """A converted layer's attention, with the signature of transformers' attention interface.

    Attributes:
        mask_limit: the most columns of a 4-D mask from which documents are read. Larger masks have biases,
            image blocks or chunks of the base model, and only pads are read from them.
    """

    mask_limit: float = inf

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        linearize_state: LinearCacheLayer | None = None,
        s_aux: Tensor | None = None,
        cache: object = None,
        position_ids: Tensor | None = None,
        sliding_window: int | None = None,
        linearize_eagerly: bool = False,
        **unused: object,
    ) -> Tensor:
        """Compute the attention of T new tokens.

        Args:
            query: `[B, heads, T, D]`.
            key, value: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            attention_mask: any mask that transformers makes: None, 2-D, 4-D boolean or additive, or the
                compact mask of `dispatch.compact_mask`. Only pads and documents are read from it. Causality
                and the window are those of the equation.
            linearize_state: the layer's cache, or None without a cache.
            s_aux: `[heads]`, learned sink logits (gpt-oss), or None. They are used with softmax scores only.
            cache: the paged cache of continuous batching, which is refused.
            position_ids: `[B or 1, T]`, or None. Documents begin where positions start again, as in
                transformers. They are read only if there are no pads and no cache.
            sliding_window: the window of the base model's mask, or None.
            linearize_eagerly: True if the mask or the positions may hold documents. The call then runs
                outside code compiled by torch.compile.

        Returns:
            `[B, T, heads, Dv]` in query's dtype.

        Raises:
            NotImplementedError: there is a paged cache.
            ValueError: the model is exported with a variable number of tokens, or the mask cannot be
                followed.
        """
        if cache is not None:
            raise NotImplementedError(NO_PAGES)
        if isinstance(query.shape[-2], torch.SymInt) and exporting():
            raise ValueError(
                "export a linearized model with a fixed number of tokens: it cuts them into chunks"
            )
        heads = query, key, value
        sink_logits = s_aux if self.equation.score == "softmax" else None
        outside = linearize_eagerly or is_document_mask(attention_mask)
        attend = self.attend_eagerly if outside else self.attend
        out = attend(heads, attention_mask, linearize_state, sink_logits, position_ids, sliding_window)
        return out.transpose(1, 2).contiguous()

    def attend(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        state: LinearCacheLayer | None,
        sink_logits: Tensor | None,
        position_ids: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """Compute the outputs `[B, heads, T, Dv]`, and append the tokens to the cache.

        Args:
            heads: query, key and value, `[B, heads or kv, T, D]`.
            mask: the attention mask in any form, or None.
            state: the layer's cache, or None.
            sink_logits: `[heads]`, learned logits without a value, or None.
            position_ids: `[B or 1, T]`, or None.
            window: the window of the base model's mask, or None.
        """
        query, past = heads[0], 0 if state is None else state.seen
        valid = valid_tokens(mask, query.shape[0], query.shape[-2], past)
        starts = None
        readable = mask is not None and not is_compact(mask) and mask.shape[-1] <= self.mask_limit
        if mask is not None and readable and not torch.compiler.is_compiling():
            before = None if state is None else state.state
            count = None if before is None else before.count
            starts = masked_documents(mask, query.shape[-2], past, count, self.equation.causal, window)
        if starts is None and valid is None and state is None and self.equation.causal:
            starts = starts_of(mask)
            if starts is None:
                starts = document_starts(position_ids)
        with loaded(self):
            apart = None if starts is None else self.attend_documents(starts, heads, valid, sink_logits)
            if state is not None:  # which takes in the whole row
                joined = state.attend(self, *heads, valid, sink_logits)
            elif apart is None:
                joined = self.attend_rows(*heads, valid, sink_logits)
        return joined if apart is None else apart

    attend_eagerly = torch.compiler.disable(attend)

    def attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, sink_logits: Tensor | None
    ) -> Tensor:
        """Compute the outputs `[B, heads, T, Dv]` of rows without a cache, each one document.

        Args:
            q: `[B, heads, T, D]`.
            k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            valid: `[B, T]` bool, False for pads, or None if there are none.
            sink_logits: `[heads]`, learned logits without a value, or None.
        """
        if self.equation.causal:
            return chunked(self, None, q, k, v, valid, sink_logits)[0]
        return bidirectional(self, q, k, v, valid, sink_logits)

    def attend_documents(
        self,
        starts: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        valid: Tensor | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Compute the outputs `[B, heads, T, Dv]` of rows that pack several documents, which do not see each
        other.

        Args:
            starts: `[B or 1, T]` bool, True where a document begins.
            heads: query, key and value, `[B, heads or kv, T, D]`.
            valid: `[B, T]` bool, False for pads, or None if there are none.
            sink_logits: `[heads]`, learned logits without a value, or None.
        """
        starts = starts.expand(heads[0].shape[0], -1)
        packed = self.equation.causal and valid is None
        if packed and packed_plan(self, *heads, sink_logits is not None) is not None:
            return attend_packed(self, starts, *heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, own: Tensor) -> Tensor:
            return self.attend_rows(q, k, v, own, sink_logits)

        if valid is None and not self.equation.causal:
            valid = torch.ones_like(starts)
        return attend_apart(attend, starts, valid, *heads)

    def place(self, cache: Cache, index: int) -> LinearCacheLayer:
        """Return the layer `index` of a cache, which holds this layer's state. An empty layer is replaced if
        needed.
        """
        return cache_layer(cache, index)


def linearized(attention: dict, geometry: dict) -> LinearAttention:
    """Build the linear attention of one layer: a cross-attention if the geometry has the key `cross`.

    Args:
        attention: the `attention` section of a recipe.
        geometry: the sizes of the base model's layer.
    """
    if "cross" in geometry:
        return LinearizedCrossAttention(cross_equation(attention, geometry))
    return LinearizedAttention(equation(attention, geometry))
