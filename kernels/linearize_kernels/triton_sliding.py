"""`sliding.sliding` in Triton, forward and backward; needs a CUDA device.

Nothing here imports Triton before it is asked for: `why_not` says whether it can be.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.sliding import Shape, Tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # of heads' dimensions and features
MOST_SINKS = 64


def why_not(shape: Shape, tokens: Tokens) -> str | None:
    """Why Triton cannot run this; None: it can."""
    try:
        from linearize_kernels.triton_sliding_forward import INTERPRETED
    except ImportError:
        return "triton is not installed"
    if not (tokens.q.is_cuda or INTERPRETED):
        return f"Triton needs a CUDA device, and the tensors are on {tokens.q.device}"
    if tokens.q.is_cuda and torch.cuda.get_device_capability(tokens.q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    dtype, chunk = tokens.q.dtype, shape.chunk
    if dtype not in DTYPES:
        return f"Triton's kernels take float32, bfloat16 and float16, not {dtype}"
    same = (tokens.k, tokens.v, tokens.phi_q, tokens.phi_k, tokens.sink_k, tokens.sink_v)
    if any(x is not None and x.dtype != dtype for x in same):
        return f"q is {dtype}, and k, v, the features and the sinks must be too"
    if chunk not in (16, 32, 64, 128):
        return f"chunks must have 16, 32, 64 or 128 tokens, not {chunk}"
    widths = {"q and k": tokens.q.shape[-1], "v": tokens.v.shape[-1]}
    if tokens.phi_q is not None:
        widths["the features"] = tokens.phi_q.shape[-1]
    for name, width in widths.items():
        if width > WIDEST:
            return f"{name} have {width} dimensions, more than {WIDEST}"
    if tokens.sink_k.shape[1] > MOST_SINKS:
        return f"{tokens.sink_k.shape[1]} sinks are more than {MOST_SINKS}"
    return None


def sliding(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What `sliding.sliding` returns. q, k, v, the features and the sinks share a dtype; S, z, mix and conv may be
    wider. Sums are in fp32.

    Raises:
        ValueError: `why_not` has a reason.
    """
    reason = why_not(shape, tokens)
    if reason is not None:
        raise ValueError(f"The sliding form's Triton kernels cannot run: {reason}. Use sliding.sliding.")
    return Sliding.apply(shape, *tokens)


class Sliding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Shape, *tensors: Tensor | None):
        from linearize_kernels.triton_sliding_forward import forward

        tokens = Tokens(*(None if x is None else x.contiguous() for x in tensors))
        with torch.cuda.device_of(tokens.q):
            out, S, z, log_total = forward(shape, tokens)
        ctx.shape = shape
        ctx.save_for_backward(*tokens, log_total)
        return out, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor, d_z: Tensor):
        from linearize_kernels.triton_sliding_backward import backward

        *tensors, log_total = ctx.saved_tensors
        tokens = Tokens(*tensors)
        with torch.cuda.device_of(tokens.q):
            grads = backward(ctx.shape, tokens, log_total, d_out.contiguous(), d_S, d_z)
        return None, *grads
