"""Cache layers of a transformers cache: those that hold a state, and those that hold keys and values."""

from typing import Any

from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionLayer

from linearize_cli.runtime.cache import HybridCacheLayer, LinearCacheLayer


def cache_layer(cache: Cache, index: int) -> LinearCacheLayer:
    """Return the cache's layer `index` as a `LinearCacheLayer`. An empty layer of another class is replaced.

    Raises:
        RuntimeError: the layer holds keys and values, or the state of another copy of this code.
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
    """Return layer `index` of a cache. A cache that creates layers on demand creates the missing ones first."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def has_layer(cache: Cache, index: int) -> bool:
    """Return True if the cache has a layer `index`, or creates layers on demand.

    It can lack one, because an early-exit drafter caches only the first layers.
    """
    cache = of_self_attention(cache)
    return cache.layer_class_to_replicate is not None or index < len(cache.layers)


def of_self_attention(cache: Cache) -> Cache:
    """Return the self-attention part of an encoder-decoder's cache. Other caches are returned as they are."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def check_empty(layer: Any, index: int) -> None:
    """Check that a cache layer which is to be replaced holds no tokens.

    Args:
        index: the layer's index, for the error.

    Raises:
        RuntimeError: it holds tokens.
    """
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
    """Check that the cache of a kept softmax layer does not hold a state. This is a forward pre-hook.

    Raises:
        RuntimeError: it does, because the cache belongs to a model that was converted differently.
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
    """Return the cache among a module's arguments, whatever its name, or None if there is no cache."""
    return next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)


def holds_state(layer: object) -> bool:
    """Return True if a cache layer is a class of ours, from this copy of the code or from that in another
    artifact.
    """
    names = {cls.__name__ for cls in type(layer).__mro__}
    return not names.isdisjoint(("LinearCacheLayer", "CrossCacheLayer"))
