"""Calls of torch on memory that stays, made again without the Python around them: it takes longer than small sums."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

R = TypeVar("R")

ASSIGNMENTS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
EMPTY = {"empty", "new_empty", "empty_like"}


class Tape(TorchFunctionMode):
    """Notes the calls that a function makes, to `play` them. It must make the same ones whatever numbers are in its
    tensors, and draw none; what it makes anew is kept, and filled again.

    Attributes:
        result: of the function; tensors in it have other numbers after each time.
    """

    def __init__(self, run: Callable[[], R]):
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        with self:
            self.result: R = run()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func.__name__
        if "out" in kwargs or name in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__")):
            self.calls.append(partial(func, *args, **kwargs))
        elif name not in EMPTY and not is_view(result, args):
            self.calls.append(filling(result, func, args, kwargs))
        return result

    def play(self) -> R:
        for call in self.calls:
            call()
        return self.result


def filling(
    result: Tensor, func: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """What puts the call's result there again: without other memory, where torch has such a function."""
    if not isinstance(result, Tensor):
        raise TypeError(f"{func.__name__} makes several tensors; a tape takes calls that make one")
    into = partial(getattr(torch, func.__name__, func), *args, **kwargs, out=result)
    try:
        if into() is result:
            return into
    except (TypeError, RuntimeError):
        pass
    return lambda: result.copy_(func(*args, **kwargs))


def is_view(result: Any, args: tuple) -> bool:
    """Whether all tensors in a call's result, if any, are in memory of its arguments."""
    found = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
    return {storage(x) for x in found} <= {storage(x) for x in args if isinstance(x, Tensor)}


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
