"""Tensors that depend on plain values alone, kept for all layers of a model and all steps of a text."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def remembered(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `lru_cache`, of tensors that are on a CPU where no device is asked for.

    Whatever is on when they are made must do for whoever asks later: training cannot use what inference mode makes, and
    what a mode makes whose tensors have no values (FakeTensorMode) is not kept.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        def afresh(*arguments: P.args) -> R:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments)

        kept = lru_cache(size)(afresh)

        @wraps(make)
        def remember(*arguments: P.args) -> R:
            has_values = type(torch.empty(0)) is Tensor
            return (kept if has_values else afresh)(*arguments)

        remember.cache_clear = kept.cache_clear
        return remember

    return decorate
