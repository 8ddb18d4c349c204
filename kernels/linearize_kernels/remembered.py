"""Caches of tensors: `remembered` for functions of plain values, `derived` for functions of a module's
parameter.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def remembered(size: int) -> Callable[[F], F]:
    """Return a decorator that caches the tensors of a function for its last `size` argument tuples, like
    `lru_cache`.

    The function's tensors are on the CPU by default. They are created outside inference mode, so that
    training can use them later. Tensors without values (FakeTensorMode) are not cached.
    """

    def decorate(make: F) -> F:
        def create(*arguments: Any) -> Any:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments)

        kept = lru_cache(size)(create)

        def remember(*arguments: Any) -> Any:
            has_values = type(torch.empty(0)) is Tensor
            return (kept if has_values else create)(*arguments)

        decorated: Any = wraps(make)(remember)
        decorated.cache_clear = kept.cache_clear
        return decorated

    return decorate


def derived(module: nn.Module, name: str, make: Callable[[Tensor], R], dtype: torch.dtype) -> R:
    """Return `make(parameter.to(dtype))`, cached until the parameter is replaced, moved or written to.

    Nothing is cached while gradients are recorded, or for an inference tensor, whose changes torch does not
    count. A change through `parameter.data` is not counted either: `forget_derived` covers it.

    Args:
        name: the parameter's name in the module. It is also the cache key, so `make` must always be the same
            for it.
        make: the function of the parameter.
        dtype: the dtype in which `make` gets the parameter.
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


def forget_derived(module: nn.Module) -> None:
    """Delete what `derived` has cached for a module and its submodules."""
    for part in module.modules():
        for name in [name for name in part.__dict__ if name.startswith("_derived_")]:
            del part.__dict__[name]
