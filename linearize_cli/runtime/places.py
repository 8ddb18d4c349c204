"""Cache layers of a transformers cache: those that hold a state, and those that hold keys and values."""

from typing import Any

from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionLayer

from linearize_cli.runtime.cache import HybridCacheLayer, LinearCacheLayer


def cache_layer(cache: Cache, index: int) -> LinearCacheLayer:
    """Return the cache's layer `index`, turned into a `LinearCacheLayer` while it is still empty.

    Raises:
        RuntimeError: the layer holds something else already.
    """
    cache = of_self_attention(cache)
    layer = grown(cache, index)
    if not isinstance(layer, LinearCacheLayer):
        check_empty(layer, index)
        if isinstance(layer, LinearAttentionLayer):
            layer = HybridCacheLayer(layer)
        else:
            layer = LinearCacheLayer(getattr(layer, "record_past", False))
        cache.layers[index] = layer
    return layer


def grown(cache: Cache, index: int) -> Any:
    """Return the cache's layer `index`. A cache that grows on demand makes all layers up to it."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def has_layer(cache: Cache, index: int) -> bool:
    """Return whether the cache has a layer `index`, or will have. An early-exit draft caches only the first layers."""
    cache = of_self_attention(cache)
    return cache.layer_class_to_replicate is not None or index < len(cache.layers)


def of_self_attention(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def check_empty(layer: Any, index: int) -> None:
    """Raise RuntimeError if a cache layer that cannot hold a state holds tokens."""
    if not (layer.is_initialized and int(layer.get_seq_length()) > 0):
        return
    if holds_state(layer):
        raise RuntimeError(
            f"layer {index} of the cache holds a state of another copy of the linearize code "
            f"({type(layer).__module__}): begin with a cache of its own for each model"
        )
    raise RuntimeError(
        f"layer {index} of the cache holds keys and values, of another model or of prefix tuning, where this model "
        "keeps a state: begin with an empty cache (of PEFT's methods, LoRA and prompt tuning need none)"
    )


def check_softmax(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Refuse a cache that holds a state where a softmax layer keeps keys and values. A forward pre-hook.

    Raises:
        RuntimeError: the cache belongs to a model that was converted differently.
    """
    cache, index = find_cache(args, kwargs), getattr(module, "layer_idx", None)
    if cache is None or isinstance(cache, EncoderDecoderCache) or index is None or index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if holds_state(layer) and layer.get_seq_length() > 0:
        raise RuntimeError(
            f"layer {index} of the cache holds a state, of another model, where this model keeps keys and values: "
            "begin with an empty cache"
        )


def find_cache(args: tuple, kwargs: dict) -> Cache | None:
    """Return the cache among a module's arguments, whatever its name."""
    return next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)


def holds_state(layer: object) -> bool:
    """Return whether a cache layer is one of ours, of this copy of the code or another."""
    names = {cls.__name__ for cls in type(layer).__mro__}
    return not names.isdisjoint(("LinearCacheLayer", "CrossCacheLayer"))
