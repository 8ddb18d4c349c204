"""The chunked forms in Triton, forward and backward, with the signatures of `torch_forms`; they need a CUDA device.

Nothing here imports Triton before a kernel is to run. `ops.backend` says whether it can.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.torch_forms.chunks import Tiling
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.sliding import Shape, Tokens
from linearize_kernels.triton.tuning import Packed


def sliding(
    shape: Shape, tokens: Tokens, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what `torch_forms.sliding.sliding` returns. Sums are in fp32.

    q, k, v, the features and the sinks share a dtype; S, z, mix and conv may be wider. Packed sequences have no S and
    z, and their sinks are in the timeline: these four are None, here and in the result, and start and skip mean
    nothing.
    """
    return Sliding.apply(shape, packed, *tokens)


def grouped(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute what `torch_forms.grouped.grouped` returns. Sums are in fp32.

    q, k, v and the features share a dtype; S, factor and conv may be wider. Packed sequences have no S, here and in the
    result, and no slots before the first key, so R is 0; folds mean nothing.
    """
    return Grouped.apply(shape, folds, packed, *tokens)


class Sliding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Shape, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.sliding_fwd import forward

        tokens = Tokens(*(None if x is None else x.contiguous() for x in tensors))
        with torch.cuda.device_of(tokens.q):
            out, S, z, log_total = forward(shape, tokens, packed)
        ctx.shape, ctx.packed = shape, packed
        ctx.save_for_backward(*tokens, log_total)
        return out, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor | None, d_z: Tensor | None):
        from linearize_kernels.triton.sliding_bwd import backward

        *tensors, log_total = ctx.saved_tensors
        tokens = Tokens(*tensors)
        with torch.cuda.device_of(tokens.q):
            grads = backward(ctx.shape, tokens, log_total, d_out.contiguous(), d_S, d_z, ctx.packed)
        return None, None, *grads


class Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Tiling, folds: int, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.grouped import forward

        tokens = Groups(*(None if x is None else x.contiguous() for x in tensors))
        ctx.shape, ctx.folds, ctx.packed = shape, folds, packed
        ctx.save_for_backward(*tokens)
        with torch.cuda.device_of(tokens.q):
            return forward(shape, folds, tokens, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor | None):
        from linearize_kernels.triton.grouped import backward

        tokens = Groups(*ctx.saved_tensors)
        with torch.cuda.device_of(tokens.q):
            grads = backward(ctx.shape, ctx.folds, tokens, d_out.contiguous(), d_S, ctx.packed)
        return None, None, None, *grads
