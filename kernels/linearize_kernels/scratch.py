"""Memory for what the blocked forms make on the way, taken again for piece after piece.

A CPU is several times slower at memory that its caches do not hold than at the sums themselves, and a new tensor's
never is there.
"""

import math
import threading

import torch
from torch import Tensor

KEPT = 1 << 20  # numbers of the largest tensor whose memory is kept


class Scratch(threading.local):
    """One block of memory by name and dtype for each thread, and the shape in which it was last taken."""

    def __init__(self):
        self.blocks: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of like's dtype and device with any contents, which lasts until the name is taken again."""
        if torch.compiler.is_compiling() or not like.is_cpu or type(like) is not Tensor:
            return like.new_empty(shape)
        key = name, like.dtype
        block, last = self.blocks.get(key, (None, None))
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        if size > KEPT:
            return like.new_empty(shape)
        with torch.inference_mode(False):
            if block is None or len(block) < size:
                block = like.new_empty(size)
            last = block[:size].view(shape)
        self.blocks[key] = block, last
        return last


SCRATCH = Scratch()
