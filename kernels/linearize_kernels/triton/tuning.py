"""The limits of the Triton kernels, and the tile sizes of their programs.

Triton is imported only when `limit` runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = (16, 32, 64, 128)
WIDEST = 256  # the most dimensions of heads and of features
OLDEST = (3, 3)  # Triton 3.2 ends the process when it compiles some of the kernels
SEGMENT = 8  # chunks that a program of `fold` sums


class Packed(NamedTuple):
    """The layout of sequences packed into one timeline (a sequence of keys).

    Each sequence starts from an empty state, begins with a chunk, and is padded to whole chunks. The kernels
    sum S over segments, which are consecutive chunks of one sequence.

    Attributes:
        begins: `[n]` int32, for each chunk the first key of its sequence after the sinks.
        segments: `[s + 1]` int32, the first chunk of each segment, and n.
        firsts: `[sequences + 1]` int32, the first segment of each sequence, and s.
        sinks: number of first tokens of each sequence that are sinks, at most a chunk.
    """

    begins: Tensor
    segments: Tensor
    firsts: Tensor
    sinks: int


class Tiles(NamedTuple):
    """The launch options of a kernel.

    Attributes:
        rows, slots, features: the sizes of a program's tile in query rows, in slots of keys, and in features.
        warps: the number of warps.
        stages: the number of stages of the software pipeline.
    """

    rows: int
    slots: int
    features: int
    warps: int
    stages: int


USUAL = Tiles(rows=64, slots=64, features=64, warps=8, stages=2)
SPECIAL = {  # by kernel and major compute capability: the sizes that spill no register in bfloat16
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
SPECIAL_WIDE = {  # the same for heads of twice as many bytes
    ("query_feature_gradients", 8): USUAL._replace(rows=32, slots=32, warps=4),
    ("group_slot_gradients", 8): USUAL._replace(rows=32, slots=16),
}


def capability(device: torch.device) -> int:
    """Return the major compute capability to choose tiles by: 8, 9 or 10.

    A chip of version 12 has the instructions and the shared memory of version 8.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return major if major in (9, 10) else 8


def tiles(kernel: str, width: int, like: Tensor) -> Tiles:
    """Return the tile sizes of a kernel for heads of `width` dimensions.

    Wide heads and wide dtypes get smaller tiles, to fit into shared memory.
    """
    times, key = padded(width) * like.element_size() // 256, (kernel, capability(like.device))
    if times == 2 and key in SPECIAL_WIDE:
        return SPECIAL_WIDE[key]
    if times > 1:
        return USUAL._replace(rows=64 // times, slots=64 // times)
    return SPECIAL.get(key, USUAL)


def padded(width: int) -> int:
    """Return the side of a tile for `width`: a power of two of at least 16, as Triton's products require."""
    return max(16, 1 << (width - 1).bit_length())


def limit(
    q: Tensor, k: Tensor, v: Tensor, features: int = 0, chunk: int | None = None, chunks: str = "chunks"
) -> str | None:
    """Return the reason why no Triton kernel can run these tensors, or None if the limits that all kernels
    share allow it.

    The limits are a GPU (or the interpreter), the dtype, the size of chunks, and the sizes of heads and
    features.

    Args:
        q, k, v: `[..., T, D]`.
        features: the number of features, or 0 without a linear part.
        chunk: tokens in each chunk, or None if there are no chunks.
        chunks: what the reason calls a chunk, for example "groups".
    """
    try:
        import triton

        from linearize_kernels.triton.common import INTERPRETED
    except ImportError:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer compiles the kernels"
    if not (q.is_cuda or INTERPRETED):
        return f"Triton needs a CUDA device, and the tensors are on {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if q.dtype not in DTYPES:
        return f"Triton's kernels take float32, bfloat16 and float16, not {q.dtype}"
    if any(x.dtype != q.dtype for x in (k, v)):
        return f"q is {q.dtype}, and k and v must be too"
    if chunk is not None and chunk not in CHUNKS:
        return f"{chunks} must have 16, 32, 64 or 128 tokens, not {chunk}"
    for name, width in {"q and k": q.shape[-1], "v": v.shape[-1], "the features": features}.items():
        if width > WIDEST:
            return f"{name} have {width} dimensions, more than {WIDEST}"
    return None
