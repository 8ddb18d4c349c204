"""The dtypes in which a checkpoint stores its weights, while the work is done in another dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and buffer of a model, by name."""
    return {name: x.dtype for name, x in tensors(model)}


@torch.no_grad()
def round_weights(model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Round the weights of a model to values that their stored dtypes can represent. Their dtypes stay.

    Args:
        stored: the stored dtype of each weight, by name. Other weights do not change.
    """
    for name, x in tensors(model):
        if stored.get(name, x.dtype) != x.dtype:
            x.copy_(x.to(stored[name]))


@contextmanager
def in_stored_dtypes(model: nn.Module, stored: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Cast the weights of a model to their stored dtypes while the context is open."""
    before = [(x, x.dtype) for name, x in tensors(model) if stored.get(name, x.dtype) != x.dtype]
    try:
        for name, x in tensors(model):
            x.data = x.data.to(stored.get(name, x.dtype))
        yield
    finally:
        for x, dtype in before:
            x.data = x.data.to(dtype)


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a model with their names."""
    return [*model.named_parameters(), *model.named_buffers()]
