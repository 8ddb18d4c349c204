"""The memory of one sequence during decoding: the constant state, and the keys and values of each token."""

from collections.abc import Iterable

import torch
from linearize_kernels.state import State
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from linearize_cli.models.layer import Layer
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.dispatch import converted


def state_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of the states of all causal linear layers for one sequence. They do not depend on its
    length.

    Args:
        dtype: the dtype of keys and values. None: the model's.
    """
    layers = (module.linear_attention for module in converted(model).values())
    states = (x.empty_state(1, "cpu", dtype or model.dtype) for x in layers if x.equation.causal)
    return sum(state.nbytes() for state in states)


def saved_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values per token that the converted layers would keep if they were still
    softmax.
    """
    equations = [module.linear_attention.equation for module in converted(model).values()]
    numbers = sum(eq.kv_heads * (eq.key_dim + eq.value_dim) for eq in equations if eq.causal)
    return numbers * model.dtype.itemsize


def kv_bytes_per_token(layers: Iterable[Layer], dtype: torch.dtype) -> int:
    """Return the bytes of keys and values per decoded token that softmax attention keeps in these layers."""
    geometries = (layer.geometry for layer in layers if layer.caches)
    numbers = sum(x["kv_heads"] * (x["key_dim"] + x["value_dim"]) for x in geometries)
    return numbers * torch.empty(0, dtype=dtype).element_size()


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors of a cache: states, keys and values, and whatever other kinds of layers
    keep.
    """
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    total = 0
    for layer in cache.layers:
        held = dict(vars(layer))
        if isinstance(layer, LinearCacheLayer):
            held["last_state"] = layer.state  # while tokens are decoded, it exists on request only
        total += sum(map(held_bytes, held.values()))
    return total


def held_bytes(x: object) -> int:
    """Return the bytes of a tensor, of a linear attention's `State`, or of a dict of them. Other objects
    count 0.
    """
    if isinstance(x, State):
        return x.nbytes()
    if isinstance(x, dict):
        return sum(map(held_bytes, x.values()))
    return x.nbytes if isinstance(x, torch.Tensor) else 0
