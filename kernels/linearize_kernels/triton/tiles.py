"""How much one program of a Triton kernel works on, by kernel, chip and head."""

from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 8  # chunks that a program of `fold` goes through


class Tiles(NamedTuple):
    """How much a program works on: query rows, slots and features at a time."""

    rows: int
    slots: int
    features: int
    warps: int
    stages: int


USUAL = Tiles(rows=64, slots=64, features=64, warps=8, stages=2)
SPECIAL = {  # by kernel and compute capability's major number; these too spill nothing in bfloat16
    ("query_means", 8): USUAL._replace(slots=32),
    ("query_gradients", 10): USUAL._replace(slots=32, warps=4, stages=3),
    ("query_feature_gradients", 10): USUAL._replace(warps=4),
    ("slot_gradients", 8): USUAL._replace(slots=32),
    ("slot_gradients", 9): USUAL._replace(rows=32),
    ("slot_gradients", 10): USUAL._replace(rows=32, stages=1),
    ("fold", 8): USUAL._replace(stages=3),
    ("group_attend", 8): USUAL._replace(slots=32),
    ("group_slot_gradients", 8): USUAL._replace(slots=32),
    ("group_slot_gradients", 9): USUAL._replace(rows=32),
}
SPECIAL_WIDE = {  # the same where a head has twice the bytes
    ("query_feature_gradients", 8): USUAL._replace(rows=32, slots=32, warps=4),
    ("group_slot_gradients", 8): USUAL._replace(rows=32, slots=16),
}


def capability(device: torch.device) -> int:
    """The major number of a chip's family: 12 has the instructions and the memory of 8."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return major if major in (9, 10) else 8


def tiles(kernel: str, width: int, like: Tensor) -> Tiles:
    """For heads as wide as `width`: fewer of them the more bytes they have, for shared memory."""
    times, own = padded(width) * like.element_size() // 256, (kernel, capability(like.device))
    if times == 2 and own in SPECIAL_WIDE:
        return SPECIAL_WIDE[own]
    if times > 1:
        return USUAL._replace(rows=64 // times, slots=64 // times)
    return SPECIAL.get(own, USUAL)


def padded(width: int) -> int:
    """The side of a tile that holds `width`: a power of two, as products in Triton want it."""
    return max(16, 1 << (width - 1).bit_length())
