"""The group form in blocks (the seed's, arXiv 2406.07368): squared ReLU within a group, a sum over all groups before.

Every group of G queries has its own G keys beside it, and the last values of the group before for the conv, which is a
band added to the weights. What the groups before have written is in S. The backward makes the weights again, so memory
is linear in T.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.tiles import (
    Tiling,
    add_windows,
    band,
    by_chunk,
    by_head,
    diagonals,
    lanes,
    part,
    running,
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
        tokens = Groups(*tensors)
        ctx.shape, ctx.folds = shape, folds
        ctx.save_for_backward(*tensors)
        out = tokens.q.new_empty(*tokens.q.shape[:-1], tokens.v.shape[-1])
        S = tokens.S.clone()
        for some in lanes(shape, tokens.q):
            forward_lanes(shape, folds, part(tokens, some), out[some], S[some])
        return out, S

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor):
        tokens = Groups(*ctx.saved_tensors)
        grads = Groups(*(None if x is None else torch.empty_like(x) for x in tokens))
        for some in lanes(ctx.shape, tokens.q):
            backward_lanes(
                ctx.shape, ctx.folds, part(tokens, some), part(grads, some), d_out[some], d_S[some]
            )
        return None, None, *grads


def weigh(shape: Tiling, q: Tensor, k: Tensor, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positive scores of a group's own keys, `[N, n, g C, C]`, and the weights of all columns, `[N, n, g C, R + C]`."""
    scores = (q @ k.mT).relu_()
    scores.unflatten(2, (-1, shape.chunk)).tril_()
    if conv is None:
        return scores, scores.square()
    weights = band(conv, shape).repeat(1, q.shape[1], 1, 1)
    weights[..., shape.recent :].addcmul_(scores, scores)
    return scores, weights


def sums(shape: Tiling, folds: int, tokens: Groups, S: Tensor) -> Tensor:
    """S before each group, `[N, n, F, Dv]`; `S` becomes what it is after the first `folds`."""
    phi, v = by_group(shape, tokens.phi_k), by_group(shape, tokens.v[:, shape.recent :])
    before = phi.mT @ v
    running(before[:, :folds].unbind(1), S)
    running(before[:, folds:].unbind(1), S.clone())
    return before


def by_group(shape: Tiling, x: Tensor) -> Tensor:
    """`[N, n C, X] -> [N, n, C, X]`."""
    return x.unflatten(1, (-1, shape.chunk))


def forward_lanes(shape: Tiling, folds: int, tokens: Groups, out: Tensor, S: Tensor) -> None:
    """Fills `out`; S goes on in place."""
    _, weights = weigh(shape, by_chunk(tokens.q, shape), by_group(shape, tokens.k), tokens.conv)
    rows = weights @ windows(tokens.v, shape)
    if tokens.phi_q is not None:
        phi_q = by_chunk(tokens.phi_q, shape)
        rows.addcmul_(by_row(shape, tokens.factor), phi_q @ sums(shape, folds, tokens, S))
    out.copy_(by_head(rows, shape))


def by_row(shape: Tiling, factor: Tensor) -> Tensor:
    """`[N, g] -> [N, 1, g C, 1]`."""
    return factor.repeat_interleave(shape.chunk, 1)[:, None, :, None]


def backward_lanes(
    shape: Tiling, folds: int, tokens: Groups, grads: Groups, d_out: Tensor, d_S: Tensor
) -> None:
    """Fills `grads`, from the gradients of what `grouped` returns."""
    q, k, d_rows = by_chunk(tokens.q, shape), by_group(shape, tokens.k), by_chunk(d_out, shape)
    scores, weights = weigh(shape, q, k, tokens.conv)
    d_weights = d_rows @ windows(tokens.v, shape).mT
    if tokens.conv is not None:
        taps = d_weights.sum(1).unflatten(1, (-1, shape.chunk))
        grads.conv.copy_(diagonals(taps, shape, tokens.conv.shape[-1]).sum(2).flip(-1))
    grads.v.zero_()
    add_windows(grads.v, weights.mT @ d_rows, shape)
    d_scores = scores.mul_(d_weights[..., shape.recent :]).mul_(2)
    grads.q.copy_(by_head(d_scores @ k, shape))
    grads.k.copy_((d_scores.mT @ q).flatten(1, 2))
    grads.S.copy_(d_S)
    if tokens.phi_q is None:
        return
    phi_q, factor = by_chunk(tokens.phi_q, shape), by_row(shape, tokens.factor)
    d_phi = d_rows @ sums(shape, folds, tokens, tokens.S.clone()).mT
    grads.factor.copy_((phi_q * d_phi).sum((1, 3)).unflatten(1, (-1, shape.chunk)).sum(-1))
    grads.phi_q.copy_(by_head(d_phi.mul_(factor), shape))
    d_sums = (phi_q * factor).mT @ d_rows
    later = torch.zeros_like(d_S)
    running(d_sums[:, folds:].unbind(1)[::-1], later)
    grads.S.add_(later)
    running(d_sums[:, :folds].unbind(1)[::-1], grads.S)
    phi_k, v = by_group(shape, tokens.phi_k), by_group(shape, tokens.v[:, shape.recent :])
    grads.v[:, shape.recent :] += (phi_k @ d_sums).flatten(1, 2)
    grads.phi_k.copy_((v @ d_sums.mT).flatten(1, 2))
