"""The places of a model's layers in a transformers cache: which of them hold a state."""

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionLayer

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


def grown(cache: Cache, index: int) -> CacheLayerMixin:
    """Return the cache's layer `index`. A cache that makes its layers as they are needed makes those up to it."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def has_layer(cache: Cache, index: int) -> bool:
    """True if there is a layer `index`, or will be: a draft that exits early has a cache for the first layers alone."""
    cache = of_self_attention(cache)
    return cache.layer_class_to_replicate is not None or index < len(cache.layers)


def of_self_attention(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def check_empty(layer: CacheLayerMixin, index: int) -> None:
    """Raise RuntimeError if a cache's layer, of another kind than a converted layer needs, holds tokens."""
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
    """Forward pre-hook of a softmax layer: refuse a cache that holds a state in its place.

    Raises:
        RuntimeError: it does, as a cache of a model that was converted differently.
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
    """Return the cache among a module's arguments: models differ in what they call it."""
    return next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)


def holds_state(layer: CacheLayerMixin) -> bool:
    """True for a converted layer's place, of this copy of the code or another."""
    names = {cls.__name__ for cls in type(layer).__mro__}
    return not names.isdisjoint(("LinearCacheLayer", "CrossCacheLayer"))
