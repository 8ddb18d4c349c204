"""`sliding.sliding` in Triton, forward and backward; needs a CUDA device.

Nothing here imports Triton before it is asked for: `why_not` says whether it can be.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.torch_forms.sliding_lane import Shape, Tokens
from linearize_kernels.torch_forms.tiles import Packed
from linearize_kernels.triton.limits import limit

MOST_SINKS = 64


def why_not(shape: Shape, tokens: Tokens, sinks: int | None = None) -> str | None:
    """Why Triton cannot run this; None: it can. sinks: of each packed sequence."""
    reason = limit(*tokens[:5], shape.chunk, "chunks", (tokens.sink_k, tokens.sink_v))
    if reason is not None:
        return reason
    most = MOST_SINKS if sinks is None else min(MOST_SINKS, shape.chunk)
    sinks = tokens.sink_k.shape[1] if sinks is None else sinks
    return f"{sinks} sinks are more than {most}" if sinks > most else None


def sliding(
    shape: Shape, tokens: Tokens, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `sliding.sliding` returns. q, k, v, the features and the sinks share a dtype; S, z, mix and conv may be
    wider. Sums are in fp32.

    Packed sequences have no S, z and sinks but their own: these are None, here and there, and start and skip mean
    nothing.

    Raises:
        ValueError: `why_not` has a reason.
    """
    reason = why_not(shape, tokens, None if packed is None else packed.sinks)
    if reason is not None:
        raise ValueError(f"The sliding form's Triton kernels cannot run: {reason}. Use sliding.sliding.")
    return Sliding.apply(shape, packed, *tokens)


class Sliding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Shape, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.sliding_forward import forward

        tokens = Tokens(*(None if x is None else x.contiguous() for x in tensors))
        with torch.cuda.device_of(tokens.q):
            out, S, z, log_total = forward(shape, tokens, packed)
        ctx.shape, ctx.packed = shape, packed
        ctx.save_for_backward(*tokens, log_total)
        return out, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor | None, d_z: Tensor | None):
        from linearize_kernels.triton.sliding_backward import backward

        *tensors, log_total = ctx.saved_tensors
        tokens = Tokens(*tensors)
        with torch.cuda.device_of(tokens.q):
            grads = backward(ctx.shape, tokens, log_total, d_out.contiguous(), d_S, d_z, ctx.packed)
        return None, None, *grads
