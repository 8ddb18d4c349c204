"""The replacement of attention modules' classes by adapted ones (see `adapters`). The original classes do not
change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from linearize_cli.runtime.adapters import ADAPTERS

PREFIX = "Adapted"
_classes: dict[type, type] = {}


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, Tensor]:
    """Compute the softmax attention of an adapted module.

    The name and the signature are those of the functions in transformers' modeling files.

    Args:
        query: `[B, heads, T, D]`.
        key, value: `[B, kv, N, D]`.
        attention_mask: additive or boolean (True for tokens that are seen), broadcastable to
            `[B, heads, T, N]`, or None.
        scaling: the factor of q·k in the scores.
        position_bias: added to the scores, broadcastable to `[B, heads, T, N]`, or None.

    Returns:
        The output `[B, T, heads, Dv]` and the weights `[B, heads, T, N]`.
    """
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), weights


def adapted_class(original: type) -> type:
    """Return the class `Adapted<Original>`, which inherits from the adapter and from the original class."""
    if original not in _classes:
        adapter = ADAPTERS[key_of(original)]
        namespace = {"__module__": __name__, "original": original}
        _classes[original] = type(PREFIX + original.__name__, (adapter, original), namespace)
    return _classes[original]


def __getattr__(name: str) -> type:
    """Return the class `Adapted<Original>` by name, creating it if needed, so that pickle finds it."""
    for key in ADAPTERS:
        package, _, original = key.partition(".")
        if name == PREFIX + original:
            file = import_module(f"transformers.models.{package}.modeling_{package}")
            return adapted_class(getattr(file, original))
    raise AttributeError(f"{name!r} is not the name of an adapted class")


def key_of(cls: type) -> str:
    """Return the name of a transformers class by which ADAPTERS lists its adapter, such as
    `bloom.BloomAttention`.

    It is empty for classes outside transformers' models.
    """
    path = cls.__module__.split(".")
    return f"{path[2]}.{cls.__name__}" if path[:2] == ["transformers", "models"] else ""


def adapt(model: nn.Module) -> list[nn.Module]:
    """Replace the class of each module with an entry in ADAPTERS by its adapted class, in place.

    A module without a `config` gets that of its nearest parent.

    Returns:
        The adapted modules.
    """
    found, configs = [], {"": model.config}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        configs[name] = getattr(module, "config", configs[parent])
        if key_of(type(module)) in ADAPTERS:
            module.config = configs[name]
            module.__class__ = adapted_class(type(module))
            found.append(module)
    return found


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Adapt the model's attention modules while the context is open, and restore their classes and configs
    afterwards.
    """
    had = {module for module in model.modules() if "config" in vars(module)}
    modules: list[Any] = adapt(model)
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = module.original
            if module not in had:
                del module.config
