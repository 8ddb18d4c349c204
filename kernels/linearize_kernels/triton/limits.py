"""What the Triton kernels of the blocked forms take. Nothing here imports Triton before it is asked for."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = (16, 32, 64, 128)
WIDEST = 256  # of heads' dimensions and features


def limit(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None = None, phi_k: Tensor | None = None,
    chunk: int | None = None, chunks: str = "chunks", others: tuple[Tensor, ...] = (),
) -> str | None:  # fmt: skip
    """Why no kernel can run this; None: nothing that both forms share forbids it.

    Args:
        chunk: tokens in each; None: there are none.
        chunks: what the form calls its chunks.
        others: what must have q's dtype too.
    """
    try:
        from linearize_kernels.triton.parts import INTERPRETED
    except ImportError:
        return "triton is not installed"
    if not (q.is_cuda or INTERPRETED):
        return f"Triton needs a CUDA device, and the tensors are on {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if q.dtype not in DTYPES:
        return f"Triton's kernels take float32, bfloat16 and float16, not {q.dtype}"
    if any(x is not None and x.dtype != q.dtype for x in (k, v, phi_q, phi_k, *others)):
        return f"q is {q.dtype}, and k, v, the features and sinks must be too"
    if chunk is not None and chunk not in CHUNKS:
        return f"{chunks} must have 16, 32, 64 or 128 tokens, not {chunk}"
    for name, x in {"q and k": q, "v": v, "the features": phi_q}.items():
        if x is not None and x.shape[-1] > WIDEST:
            return f"{name} have {x.shape[-1]} dimensions, more than {WIDEST}"
    return None
