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
    """One block of memory by name and dtype for each thread."""

    def __init__(self):
        self.blocks: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of like's dtype and device with any contents, which lasts until the name is taken again."""
        size = math.prod(shape)
        if (
            torch.compiler.is_compiling()
            or like.device.type != "cpu"
            or type(like) is not Tensor
            or size > KEPT
        ):
            return like.new_empty(shape)
        block = self.blocks.get((name, like.dtype))
        if block is None or len(block) < size:
            with torch.inference_mode(False):
                block = self.blocks[name, like.dtype] = like.new_empty(size)
        return block[:size].view(shape)


SCRATCH = Scratch()
