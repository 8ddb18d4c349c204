"""Memory for what the blocked forms make on the way, taken again for piece after piece.

A CPU is several times slower at memory that its caches do not hold than at the sums themselves, and a new tensor's
never is there.
"""

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

KEPT = 1 << 20  # numbers of the largest tensor whose memory is kept
REMEMBERED = 32  # things made of memory

R = TypeVar("R")


class Scratch(threading.local):
    """One block of memory by name and dtype for each thread, the shape in which it was last taken, and what was made of
    such memory.
    """

    def __init__(self):
        self.blocks: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.made: dict[Hashable, Any] = {}
        self.unkept = 0  # tensors given whose memory is not kept

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of like's dtype and device with any contents, which lasts until the name is taken again."""
        if not keeps(like):
            return self.new(like, shape)
        key = name, like.dtype
        block, last = self.blocks.get(key, (None, None))
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        if size > KEPT:
            return self.new(like, shape)
        with torch.inference_mode(False):
            if block is None or len(block) < size:
                if block is not None:
                    self.made.clear()  # it would hold the old block
                block = like.new_empty(size)
            last = block[:size].view(shape)
        self.blocks[key] = block, last
        return last

    def new(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        self.unkept += 1
        return like.new_empty(shape)

    def remember(self, key: Hashable, like: Tensor, make: Callable[[], R]) -> R:
        """What `make` makes with tensors taken here as `like`; the same again for the same key, for a while, if the
        memory of all that it takes is kept.
        """
        if not keeps(like):
            return make()
        found = self.made.pop(key, None)
        if found is None:
            unkept = self.unkept
            found = make()
            if self.unkept > unkept:
                return found
        if len(self.made) >= REMEMBERED:
            del self.made[next(iter(self.made))]
        self.made[key] = found
        return found


def keeps(like: Tensor) -> bool:
    """Whether memory for what is like it is kept: it has values, and lies in a CPU's."""
    return not torch.compiler.is_compiling() and like.is_cpu and type(like) is Tensor


SCRATCH = Scratch()
