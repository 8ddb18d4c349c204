"""Calls of torch on memory that stays, made again without the Python around them: it takes longer than small sums."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from linearize_kernels.torch_forms.scratch import SCRATCH

R = TypeVar("R")

IN_PLACE = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"
ASSIGNMENTS = {"__setitem__", *(f"__i{name}__" for name in IN_PLACE)}
VALUES = {"__bool__", "__int__", "__index__", "__float__", "__complex__", "item", "tolist"}
EMPTY = {"empty", "new_empty", "empty_like"}


class Tape(TorchFunctionMode):
    """Notes the calls that a function makes, to `play` them. It must make the same ones whatever numbers are in its
    tensors, and draw none. What it makes anew is put into memory of `SCRATCH`, the same for all tapes where that keeps
    it.

    Attributes:
        calls: none, where torch's functions are not to be seen.
        result: of the function; tensors in it last until the next tape is played or made.
    """

    def __init__(self, run: Callable[[], R]):
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.made = 0
        with self:
            self.result: R = run()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if name in VALUES:
            raise TypeError(f"{name} reads a number; what a tape plays must not depend on one")
        result = func(*args, **kwargs)
        if "out" in kwargs or name in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__")):
            self.calls.append(partial(func, *args, **kwargs))
        elif name not in EMPTY and not is_view(result, args):
            result = self.keep(result, func, args, kwargs)
        return result

    def keep(self, result: Any, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Memory for what a call has made anew, which the call fills: itself, where torch has such a function."""
        if not isinstance(result, Tensor):
            raise TypeError(f"{func.__name__} makes several tensors; a tape takes calls that make one")
        place = SCRATCH.take(f"made {self.made}", result, *result.shape).copy_(result)
        self.made += 1
        self.calls.append(partial(self.fill, len(self.calls), place, func, args, kwargs))
        return place

    def fill(
        self, index: int, place: Tensor, func: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Makes such a call when first played, and finds how: made twice at once, its FLOPs would be counted twice."""
        into = partial(getattr(torch, func.__name__, func), *args, **kwargs, out=place)
        try:
            fills = into() is place
        except (TypeError, RuntimeError):
            fills = False
        self.calls[index] = into if fills else lambda: place.copy_(func(*args, **kwargs))
        if not fills:
            self.calls[index]()

    def play(self) -> R:
        for call in self.calls:
            call()
        return self.result


def is_view(result: Any, args: tuple) -> bool:
    """Whether all tensors in a call's result, if any, are in memory of its arguments."""
    found = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
    return {storage(x) for x in found} <= {storage(x) for x in args if isinstance(x, Tensor)}


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
