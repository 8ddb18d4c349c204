"""Hedgehog's features in blocks: two softmaxes made where they stay, forward and backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.torch_forms.scratch import SCRATCH


def softmax_pair(
    x: Tensor, W: Tensor, weight: Tensor | None, before: int, ahead: int, out: Tensor | None = None
) -> Tensor:
    """`weight [softmax(xW), softmax(-xW)]`, made where it stays, zero for the first `before` and last `ahead` tokens:
    `x [..., heads, T, D]`, `W [heads, D, F]`, `weight [..., heads, T, 1]` or None, 1. out: where it stays; None: in new
    memory.
    """
    shape = *x.shape[:-1], 2, W.shape[-1]
    pair = x.new_empty(shape) if out is None else out.view(shape)
    one, other = pair.flatten(0, -4).unbind(-2)
    every = W if x.shape[:-3].numel() == 1 else W.expand(*x.shape[:-2], -1, -1).flatten(0, -3)
    torch.bmm(x.flatten(0, -3), every, out=one)
    torch.neg(one, out=other)
    phi = torch.softmax(pair, -1, out=pair).flatten(-2)
    if weight is not None:
        phi *= weight
    if before:
        phi[..., :before, :] = 0
    if ahead:
        phi[..., -ahead:, :] = 0
    return phi


class SoftmaxPair(torch.autograd.Function):
    """`softmax_pair`, of which only the features are kept for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, weight: Tensor | None, before: int, ahead: int) -> Tensor:
        phi = softmax_pair(x, W, weight, before, ahead)
        ctx.save_for_backward(x, W, weight, phi)
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx, d_phi: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        d, d_weight = through_softmax(*rest, d_phi)
        return d @ W.mT, (x.mT @ d).sum_to_size(W.shape), d_weight, None, None


def through_softmax(weight: Tensor | None, phi: Tensor, d_phi: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of xW `[..., T, F]`, which lasts until the next ones, and of the weight, from those of
    `softmax_pair`.
    """
    phi, d_phi = (x.unflatten(-1, (2, -1)) for x in (phi, d_phi))
    d_pair = torch.mul(phi, d_phi, out=SCRATCH.take("pair", phi, *phi.shape))
    mean = d_pair.sum(-1, keepdim=True)
    if weight is not None:
        mean /= weight[..., None]
    one, other = d_pair.addcmul_(phi, mean, value=-1).unbind(-2)
    d = torch.sub(one, other, out=SCRATCH.take("halves", phi, *one.shape))
    return d, None if weight is None else mean.sum(-2)
