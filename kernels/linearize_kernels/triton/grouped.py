"""`grouped.grouped` in Triton, forward and backward; needs a CUDA device.

Nothing here imports Triton before it is asked for: `why_not` says whether it can be.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.tiles import Packed, Tiling
from linearize_kernels.triton.limits import limit


def why_not(shape: Tiling, tokens: Groups) -> str | None:
    """Why Triton cannot run this; None: it can."""
    return limit(*tokens[:5], shape.chunk, "groups")


def grouped(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `grouped.grouped` returns. q, k, v and the features share a dtype; S, factor and conv may be wider. Sums are
    in fp32.

    Packed sequences have no S, which is None here and there, and no slots before the first key, so R is 0; folds mean
    nothing.

    Raises:
        ValueError: `why_not` has a reason.
    """
    reason = why_not(shape, tokens)
    if reason is not None:
        raise ValueError(f"The group form's Triton kernels cannot run: {reason}. Use grouped.grouped.")
    return Grouped.apply(shape, folds, packed, *tokens)


class Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Tiling, folds: int, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.grouped_kernels import forward

        tokens = Groups(*(None if x is None else x.contiguous() for x in tensors))
        ctx.shape, ctx.folds, ctx.packed = shape, folds, packed
        ctx.save_for_backward(*tokens)
        with torch.cuda.device_of(tokens.q):
            return forward(shape, folds, tokens, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor | None):
        from linearize_kernels.triton.grouped_kernels import backward

        tokens = Groups(*ctx.saved_tensors)
        with torch.cuda.device_of(tokens.q):
            grads = backward(ctx.shape, ctx.folds, tokens, d_out.contiguous(), d_S, ctx.packed)
        return None, None, None, *grads
