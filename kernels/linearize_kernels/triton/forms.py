"""The chunked forms in Triton, forward and backward, with the signatures of `torch_forms`, for CUDA devices.

Triton is imported on the first call. `ops.backend` decides if it can run.
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
    """Compute softmax in a sliding window joined with linear attention to older tokens, in Triton.

    It is `torch_forms.sliding.sliding` with sums in fp32. q, k, v, the features and the sinks must have one
    dtype. S, z, mix and conv may have a wider one.

    Args:
        shape: the sizes of chunks, window and sequence.
        tokens: the inputs.
        packed: the layout of packed sequences, or None. With it, `tokens` has None for S, z and the sinks,
            which are among the keys. `start` and `skip` of `shape` are ignored.

    Returns:
        The outputs `[N, g, n C, Dv]`, and S `[N, F, Dv]` and z `[N, F]` after all tokens (None for packed
        sequences).
    """
    return Sliding.apply(shape, packed, *tokens)


def grouped(
    shape: Tiling, folds: int, tokens: Groups, packed: Packed | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute squared ReLU within groups of tokens, plus linear attention to earlier groups, in Triton.

    It is `torch_forms.grouped.grouped` with sums in fp32. q, k, v and the features must have one dtype. S,
    factor and conv may have a wider one.

    Args:
        shape: the sizes C and R.
        folds: the number of groups to add to the returned S.
        tokens: the inputs.
        packed: the layout of packed sequences, or None. With it, S is None in `tokens` and in the result, R
            must be 0, and `folds` is ignored.

    Returns:
        The outputs `[N, g, n C, Dv]`, and S after the first `folds` groups, `[N, F, Dv]`.
    """
    return Grouped.apply(shape, folds, packed, *tokens)


class Sliding(torch.autograd.Function):
    """The autograd function of `sliding`: its forward and backward run the Triton kernels."""

    @staticmethod
    def forward(ctx, shape: Shape, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.sliding_fwd import forward

        tokens = Tokens._make(None if x is None else x.contiguous() for x in tensors)
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
    """The autograd function of `grouped`: its forward and backward run the Triton kernels."""

    @staticmethod
    def forward(ctx, shape: Tiling, folds: int, packed: Packed | None, *tensors: Tensor | None):
        from linearize_kernels.triton.grouped import forward

        tokens = Groups._make(None if x is None else x.contiguous() for x in tensors)
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
