"""A converted layer's attention: masks, pads and state around the equation."""

import torch
from linearize_kernels.attention import Equation, LinearAttention
from linearize_kernels.bidirectional import bidirectional
from linearize_kernels.chunked import chunked
from linearize_kernels.varlen import runs
from torch import Tensor
from transformers.cache_utils import Cache

from linearize_cli.runtime.cache import LinearCacheLayer, cache_layer
from linearize_cli.runtime.cross import LinearizedCrossAttention, cross_equation
from linearize_cli.runtime.packed import attend_apart, attend_packed, document_starts


def equation(attention: dict, geometry: dict) -> Equation:
    """The equation of one layer.

    Args:
        attention: the `attention` part of a recipe.
        geometry: the first fields of `Equation`, those of the base model's layer.
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
    """What stands behind the attention interface of transformers in a converted layer."""

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
        **unused: object,
    ) -> Tensor:
        """query `[B, heads, T, D]`, key and value `[B, kv, T, D]` -> `[B, T, heads, Dv]` in query's dtype.

        Args:
            attention_mask: any mask that transformers makes: None, 2-D, 4-D boolean or additive, or the
                compact one of `dispatch.compact_mask`. Only pads are read from it: causality and the window
                are the equation's.
            linearize_state: the layer's place in the cache, or None without one.
            s_aux: `[heads]` learned sink logits (gpt-oss).
            cache: the paged cache of continuous batching, which holds no state.
            position_ids: `[B or 1, T]`, of which documents are read that are packed into one row, where there
                are neither pads nor a cache; None: a row is one.
        """
        if cache is not None:
            raise NotImplementedError(
                "continuous batching pages keys and values; a linearized layer keeps a state instead. "
                "Use model.generate()."
            )
        past = 0 if linearize_state is None else linearize_state.seen
        valid = valid_tokens(attention_mask, query.shape[0], query.shape[-2], past)
        sink_logits = s_aux if self.equation.score == "softmax" else None
        if not self.equation.causal:
            out = bidirectional(self, query, key, value, valid, sink_logits)
        elif linearize_state is not None:
            out = linearize_state.attend(self, query, key, value, valid, sink_logits)
        else:
            starts = None if valid is not None else document_starts(position_ids, query.shape[0])

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return chunked(self, None, q, k, v, valid, sink_logits)[0]

            heads = (query, key, value)
            if starts is None:
                out = attend(*heads)
            elif runs(self, *heads, sink_logits is not None):
                out = attend_packed(self, starts, *heads)
            else:
                out = attend_apart(attend, starts, *heads)
        return out.transpose(1, 2).contiguous()

    def place(self, cache: Cache, index: int) -> LinearCacheLayer:
        """The layer's place in a cache."""
        return cache_layer(cache, index)


def linearized(attention: dict, geometry: dict) -> LinearAttention:
    """What converts one layer: see `equation`, and `cross_equation` where the geometry says `cross`."""
    if "cross" in geometry:
        return LinearizedCrossAttention(cross_equation(attention, geometry))
    return LinearizedAttention(equation(attention, geometry))


def valid_tokens(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """Which of the T new tokens are not pads, `[B, T]` bool; None: all.

    In a 4-D mask a token is a pad if it may not see itself.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    if mask.dtype == torch.int8:  # compact_mask
        return mask[:, 0, :, 0].bool()
    mask = mask[:, 0]
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    start = past if mask.shape[-1] >= past + length else mask.shape[-1] - length
    if mask.shape[1] == 1:  # one row for all queries
        valid = mask[:, 0, start : start + length].expand(batch, -1)
    else:
        valid = mask[:, -length:, start:].diagonal(dim1=1, dim2=2)[:, :length].expand(batch, -1)
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid
