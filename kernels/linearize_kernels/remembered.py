"""Tensors that are computed once and kept: those of plain values, and those of a module's parameter."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def remembered(size: int) -> Callable[[F], F]:
    """Cache what a function returns, as `lru_cache` does, with its tensors on the CPU unless it asks for a device.

    Whatever is on when they are made must do for whoever asks later: training cannot use what inference mode makes, and
    what a mode makes whose tensors have no values (FakeTensorMode) is not kept.
    """

    def decorate(make: F) -> F:
        def afresh(*arguments: Any) -> Any:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments)

        kept = lru_cache(size)(afresh)

        def remember(*arguments: Any) -> Any:
            has_values = type(torch.empty(0)) is Tensor
            return (kept if has_values else afresh)(*arguments)

        decorated: Any = wraps(make)(remember)
        decorated.cache_clear = kept.cache_clear
        return decorated

    return decorate


def derived(module: nn.Module, name: str, make: Callable[[Tensor], R], dtype: torch.dtype) -> R:
    """Return `make(parameter.to(dtype))`, computed again only if the parameter was replaced, moved or written to.

    With gradients it is computed every time. So it is for an inference tensor: torch does not count its changes.

    Args:
        name: the parameter's name in the module. A parameter has one `make`.
    """
    parameter: Any = module._parameters[name]  # not None: the caller has it
    if parameter.is_inference() or (parameter.requires_grad and torch.is_grad_enabled()):
        return make(parameter.to(dtype))
    stamp = dtype, parameter.data_ptr(), parameter._version
    kept = module.__dict__.get(f"_derived_{name}")
    if kept is None or kept[0] != stamp:
        with torch.inference_mode(False), torch.no_grad():
            kept = stamp, make(parameter.to(dtype))
        module.__dict__[f"_derived_{name}"] = kept
    return kept[1]
