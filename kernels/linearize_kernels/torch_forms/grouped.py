"""The group form in blocks (the seed's, arXiv 2406.07368): squared ReLU within a group, a sum over all groups before.

Every group of G queries has its own G keys beside it, and the last values of the group before for the conv, which is a
band added to the weights. What the groups before have written is in S. The backward makes the weights again, so memory
is linear in T.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.parts.feature_maps import length_of
from linearize_kernels.torch_forms.scratch import SCRATCH
from linearize_kernels.torch_forms.tiles import (
    Tiling,
    accumulate,
    band,
    by_chunk,
    by_head,
    diagonals,
    product,
    put_columns,
    running_sums,
    windows,
)


class Groups(NamedTuple):
    """n whole groups of C tokens, for N heads of keys with g query heads each.

    Attributes:
        q: `[N, g, n C, D]`, k: `[N, n C, D]`, of unit norm, zero where no token is; v: `[N, R + n C, Dv]`, R older ones
            for the conv first.
        phi_q: `[N, g, n C, F]`, phi_k: `[N, n C, F]`, zero where no token is; factor: `[N, g]`, by which the far part
            counts; all None: no far part.
        conv: `[N, g, W]` or None.
        S: `[N, F, Dv]`, of all groups before.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    factor: Tensor | None
    conv: Tensor | None
    S: Tensor


def grouped(shape: Tiling, folds: int, tokens: Groups) -> tuple[Tensor, Tensor]:
    """Outputs `[N, g, n C, Dv]` for groups of C, and S with the first `folds` groups."""
    return Grouped.apply(shape, folds, *tokens)


class Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Tiling, folds: int, *tensors: Tensor | None):
        ctx.shape, ctx.folds = shape, folds
        ctx.save_for_backward(*tensors)
        return forward(shape, folds, Groups(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor):
        tokens = Groups(*ctx.saved_tensors)
        with torch.autocast(tokens.q.device.type, enabled=False):
            return None, None, *backward(ctx.shape, ctx.folds, tokens, d_out, d_S)


class UnitNorm(torch.autograd.Function):
    """`unit_norm`, whose backward takes three passes over the gradients; autograd's own takes ten."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        length = length_of(x)
        out = x / length
        ctx.save_for_backward(out, length)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> Tensor:
        out, length = ctx.saved_tensors
        along = (out * d_out).sum(-1, keepdim=True)
        along *= length > torch.finfo(length.dtype).eps  # a shorter vector is divided by a constant
        return d_out.addcmul(out, along, value=-1).div_(length)


def weigh(shape: Tiling, q: Tensor, k: Tensor, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positive scores of a group's own keys, `[N, n, g C, C]`, and the weights of all columns, `[N, n, g C, R + C]`."""
    scores = product(q, k.mT, "scores").relu_()
    scores.unflatten(2, (-1, shape.chunk)).tril_()
    if conv is None:
        return scores, scores.square()
    weights = SCRATCH.take("weights", scores, *scores.shape[:3], shape.columns)
    weights.copy_(band(conv, shape))[..., shape.recent :].addcmul_(scores, scores)
    return scores, weights


def sums(shape: Tiling, tokens: Groups) -> Tensor:
    """S before each group and after the last, `[N, n + 1, F, Dv]`."""
    phi_k, v = by_group(shape, tokens.phi_k), by_group(shape, tokens.v[:, shape.recent :])
    memory = SCRATCH.take("S", v, len(v), v.shape[1] + 1, *tokens.S.shape[1:])
    return running_sums(phi_k, v, tokens.S, out=memory)


def by_group(shape: Tiling, x: Tensor) -> Tensor:
    """`[N, n C, X] -> [N, n, C, X]`."""
    return x.unflatten(1, (-1, shape.chunk))


def columns(shape: Tiling, v: Tensor) -> Tensor:
    """The values of every group's columns, `[N, n, R + C, Dv]`; of one lane without a copy."""
    view = windows(v, shape)
    return view if len(v) == 1 else view.contiguous()


def forward(shape: Tiling, folds: int, tokens: Groups) -> tuple[Tensor, Tensor]:
    """What `grouped` returns."""
    _, weights = weigh(shape, by_chunk(tokens.q, shape), by_group(shape, tokens.k), tokens.conv)
    rows = product(weights, columns(shape, tokens.v))
    if tokens.phi_q is None:
        return by_head(rows, shape), tokens.S.clone()
    S = sums(shape, tokens)
    rows.addcmul_(by_row(shape, tokens.factor), product(by_chunk(tokens.phi_q, shape), S[:, :-1], "read"))
    return by_head(rows, shape), S[:, folds].clone()


def by_row(shape: Tiling, factor: Tensor) -> Tensor:
    """`[N, g] -> [N, 1, g C, 1]`."""
    return factor.repeat_interleave(shape.chunk, 1)[:, None, :, None]


def backward(shape: Tiling, folds: int, tokens: Groups, d_out: Tensor, d_S: Tensor) -> Groups:
    """The gradients of `tokens`, from those of what `grouped` returns."""
    d_phi_q = d_phi_k = d_factor = d_conv = None
    q, k, d_rows = by_chunk(tokens.q, shape), by_group(shape, tokens.k), by_chunk(d_out, shape)
    scores, weights = weigh(shape, q, k, tokens.conv)
    d_weights = product(d_rows, columns(shape, tokens.v).mT, "d_near")
    if tokens.conv is not None:
        taps = d_weights.sum(1).unflatten(1, (-1, shape.chunk))
        d_conv = diagonals(taps, shape, tokens.conv.shape[-1]).sum(2).flip(-1)
    d_v = torch.empty_like(tokens.v)
    put_columns(d_v, weights, d_rows, shape)
    d_scores = scores.mul_(d_weights[..., shape.recent :]).mul_(2)
    d_q = by_head(product(d_scores, k), shape)
    d_k = product(d_scores.mT, q).flatten(1, 2)
    if tokens.phi_q is not None:
        phi_q, factor = by_chunk(tokens.phi_q, shape), by_row(shape, tokens.factor)
        d_phi = d_rows @ sums(shape, tokens)[:, :-1].mT
        d_factor = (phi_q * d_phi).sum((1, 3)).unflatten(1, (-1, shape.chunk)).sum(-1)
        d_phi_q = by_head(d_phi.mul_(factor), shape)
        scaled = phi_q * factor
        early, late = ([x[:, part] for x in (scaled, d_rows)] for part in (slice(folds), slice(folds, None)))
        later = running_sums(*late, torch.zeros_like(d_S), backwards=True)
        earlier = running_sums(*early, later[:, 0] + d_S, backwards=True)
        d_S, d_sums = earlier[:, 0], torch.cat([earlier[:, 1:], later[:, 1:]], 1)
        phi_k, v = by_group(shape, tokens.phi_k), by_group(shape, tokens.v[:, shape.recent :])
        accumulate(d_v[:, shape.recent :], phi_k, d_sums)
        d_phi_k = (v @ d_sums.mT).flatten(1, 2)
    return Groups(d_q, d_k, d_v, d_phi_q, d_phi_k, d_factor, d_conv, d_S)
