"""`sliding.sliding` in Triton, forward and backward; needs a CUDA device.

Nothing here imports Triton before it is asked for: `why_not` says whether it can be.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.sliding import Shape, Tokens
from linearize_kernels.triton_limits import limit

MOST_SINKS = 64


def why_not(shape: Shape, tokens: Tokens) -> str | None:
    """Why Triton cannot run this; None: it can."""
    sinks = (tokens.sink_k, tokens.sink_v)
    reason = limit(*tokens[:5], shape.chunk, "chunks", sinks)
    if reason is not None:
        return reason
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
