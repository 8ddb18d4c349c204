"""The sliding form in blocks: a softmax window, far features that are positive weights, one normaliser, the conv.

For every chunk of C queries the R slots before it, its own and the A ahead of it lie side by side, `R + C + A` columns.
In each column a token is near, far or not there, so one matrix of weights holds both parts, and with the conv as a band
added to it one product reads all the values. What is older than the columns is in S, the sum of `φ(k) vᵀ` of the chunks
before, and where rows see ahead of those behind the columns too. The backward makes the weights again, so memory is
linear in T.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.combine import TINY
from linearize_kernels.scratch import SCRATCH
from linearize_kernels.sliding_lane import LOW, Beside, Lane, Shape, Tokens, flat
from linearize_kernels.tiles import (
    accumulate,
    band,
    by_chunk,
    by_head,
    diagonals,
    product,
    put_products,
    running,
    running_sums,
)


def sliding(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[N, g, n C, Dv]`, and S and z with the timeline's first n C slots."""
    return Sliding.apply(shape, *tokens)


class Sliding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Shape, *tensors: Tensor | None):
        ctx.shape, tokens = shape, Tokens(*tensors)
        ctx.save_for_backward(*tensors)
        lane = lane_of(shape, tokens)
        out = tokens.v.new_empty(*lane.q.shape[:3], tokens.v.shape[-1])
        S, z = forward(shape, lane, tokens, out)
        return by_head(out, shape), S.clone(), z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor, d_z: Tensor):
        shape, tokens = ctx.shape, Tokens(*ctx.saved_tensors)
        lane = lane_of(shape, tokens)
        d = gradients(lane, tokens, torch.zeros_like(tokens.sink_k), torch.zeros_like(tokens.sink_v), new)
        with torch.autocast(tokens.q.device.type, enabled=False):
            d_S, d_z = backward(shape, lane, tokens, by_chunk(d_out, shape), d_S, d_z, d)
        d_q, d_phi_q, d_mix = (None if x is None else by_head(x, shape) for x in (d.q, d.phi_q, d.mix))
        d_mix = None if d_mix is None else d_mix.squeeze(-1)
        return None, *d._replace(q=d_q, phi_q=d_phi_q, mix=d_mix, S=d_S, z=d_z)


def lane_of(shape: Shape, tokens: Tokens) -> Lane:
    mix = None if tokens.mix is None else by_chunk(tokens.mix[..., None], shape)
    q, phi_q = (None if x is None else by_chunk(x, shape) for x in (tokens.q, tokens.phi_q))
    lane = Lane(shape, q, tokens.k, tokens.v, phi_q, tokens.phi_k, mix)
    lane.band = None if tokens.conv is None else band(tokens.conv, shape)
    return lane


def gradients(
    lane: Lane, tokens: Tokens | Beside, sink_k: Tensor, sink_v: Tensor, take: Callable[..., Tensor]
) -> Tokens:
    """Room for those of what lies in a lane, in its layout; the conv's begin at zero, the sinks' as given, and those of
    S and z are not there. take: as of `Scratch`.
    """
    names = "q", "k", "v", "phi_q", "phi_k", "mix"
    found = {
        name: None if x is None else take(f"d_{name}", x, *x.shape)
        for name, x in ((name, getattr(lane, name)) for name in names)
    }
    conv = None if tokens.conv is None else torch.zeros_like(tokens.conv)
    return Tokens(**found, conv=conv, S=None, z=None, sink_k=sink_k, sink_v=sink_v)


def new(name: str, like: Tensor, *shape: int) -> Tensor:
    """As `Scratch.take`, to be kept."""
    return like.new_empty(shape)


class Weights(NamedTuple):
    """Weights of one step.

    Attributes:
        near: `[N, n, g C, R + C + A]`, of the near columns; sinks: `[N, sinks, n g C]`; both normalised.
        factor: `[N, n, g C, 1]`, what the far columns' products (and what is read of S) are to be multiplied by.
        S, z: outside each chunk's columns, and after the last chunk, `[N, n + 1, F, Dv]` and `[N, n + 1, F]`; mass:
            what is read of z, `[N, n, g C, 1]`.
    """

    near: Tensor
    sinks: Tensor
    factor: Tensor | None
    S: Tensor | None
    z: Tensor | None
    mass: Tensor | None


def weigh(shape: Shape, lane: Lane, tokens: Tokens | Beside) -> Weights:
    """Weights of tokens that lie in a lane. No row has the first column near: in its place the softmax over the near
    columns gets the logarithm of all the weight that is not near, so that it normalises everything at once.
    """
    sinks, S, z, mass, total = sink_scores(shape, lane, tokens.sink_k), None, None, None, None
    if lane.phi_q is None:
        weight = torch.full_like(lane.first, LOW)
    else:
        S, z, mass, total = weigh_far(shape, lane, tokens)
        weight = total.log().add_(lane.mix).clamp_(min=LOW)
    torch.baddbmm(lane.near, lane.queries, lane.keys.mT, alpha=shape.scale, out=lane.flat_scores)
    hide_absent(shape, lane.scores)
    others = torch.cat([weight.flatten(1)[:, None], sinks], 1)
    # Far above the scores of a row that sees nothing.
    ceiling = others.amax(1, keepdim=True).clamp_(min=LOW / 2)
    shares = others.sub_(ceiling).exp_()
    sum_of_shares = shares.sum(1, keepdim=True).clamp_(min=TINY)
    lane.first.copy_(ceiling.add_(sum_of_shares.log()).view(lane.first.shape))
    near = torch.softmax(lane.scores, -1, out=lane.scores)
    shares *= torch.div(lane.first.reshape(ceiling.shape), sum_of_shares, out=ceiling)
    lane.first.zero_()
    factor = None if total is None else shares[:, :1].reshape(total.shape).div_(total)
    return Weights(near, shares[:, 1:], factor, S, z, mass)


def weigh_far(shape: Shape, lane: Lane, tokens: Tokens | Beside) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes a lane's products. S, z and what is read of it, as in `Weights`, and that with the sum of the products,
    `[N, n, g C, 1]`.
    """
    chunks = lane.q.shape[1]
    S = running_sums(lane.old_phi[:, :chunks], lane.old_v[:, :chunks], tokens.S, name="S")
    slots = lane.old_phi.sum(-2)
    z = running(slots[:, :chunks], tokens.z)
    if shape.ahead:
        ahead = lane.old_phi[:, -chunks:], lane.old_v[:, -chunks:]
        S[:, :-1] += running_sums(*ahead, torch.zeros_like(tokens.S), backwards=True)[:, 1:]
        z[:, :-1] += running(slots[:, -chunks:], torch.zeros_like(tokens.z), backwards=True)[:, 1:]
    torch.bmm(lane.phi_queries, lane.phi_keys.mT, out=lane.flat_products)
    lane.tiles.mul_(lane.far)
    # A product with one column would take six times as long as with one row.
    mass = torch.bmm(flat(z[:, :-1, None]), lane.phi_queries.mT).view_as(lane.mix)
    return S, z, mass, lane.products.sum(-1, keepdim=True).add_(mass).clamp_(min=TINY)


def sink_scores(shape: Shape, lane: Lane, sink_k: Tensor) -> Tensor:
    """`[N, sinks, n g C]`; a query that comes before a sink does not see it."""
    scores = torch.bmm(shape.scale * sink_k, lane.rows.mT)
    count, (chunks, rows) = scores.shape[1], lane.q.shape[1:3]
    if shape.start < count:
        position = shape.start + torch.arange(chunks * shape.chunk, device=scores.device)
        position = position.view(chunks, 1, -1).expand(-1, rows // shape.chunk, -1).flatten()
        scores.masked_fill_(position < torch.arange(count, device=scores.device)[:, None], LOW)
    return scores


def hide_absent(shape: Shape, scores: Tensor) -> None:
    """Lower the scores `[N, n, g C, R + C + A]` of slots that are not there."""
    chunks, columns = scores.shape[1], scores.shape[3]
    for i in range(min(chunks, -(-shape.skip // shape.chunk))):
        scores[:, i, :, : shape.skip - i * shape.chunk] = LOW
    for i in range(min(chunks, -(-shape.ahead // shape.chunk))):
        scores[:, -1 - i, :, columns - shape.ahead + i * shape.chunk :] = LOW


def columns(lane: Lane, weights: Weights, with_conv: bool) -> Tensor:
    """The weights of all columns, in the memory of near."""
    near = weights.near.add_(lane.band) if with_conv and lane.band is not None else weights.near
    if weights.factor is not None:
        lane.far_scores.addcmul_(lane.products, weights.factor)
    return near


def forward(shape: Shape, lane: Lane, tokens: Tokens | Beside, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the outputs of tokens that lie in a lane to `out [N, n, g C, Dv]`, and returns S and z with its first n C
    slots, in its memory.
    """
    weights, total, rows = weigh(shape, lane, tokens), flat(out), out.flatten(1, 2)
    if lane.phi_q is None:
        torch.bmm(weights.sinks.mT, tokens.sink_v, out=rows)
    else:
        torch.bmm(lane.phi_queries, flat(weights.S[:, :-1]), out=total)
        out *= weights.factor
        torch.baddbmm(rows, weights.sinks.mT, tokens.sink_v, out=rows)
    torch.baddbmm(total, flat(columns(lane, weights, with_conv=True)), lane.values, out=total)
    return (tokens.S, tokens.z) if lane.phi_q is None else (weights.S[:, -1], weights.z[:, -1])


def backward(
    shape: Shape, lane: Lane, tokens: Tokens | Beside, d_rows: Tensor, d_S: Tensor, d_z: Tensor, d: Tokens
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of tokens that lie in a lane to d, which is laid out as by `gradients`, from those of the
    outputs `[N, n, g C, Dv]` and of S and z after them; returns those of S and z before.

    With weights w_j of one normaliser, `d log w_j = w_j (d_out · v_j - Σ_i w_i d_out · v_i)`, for far ones too.
    """
    weights = weigh(shape, lane, tokens)
    near, sinks, factor = columns(lane, weights, with_conv=False), weights.sinks, weights.factor
    rows = d_rows.flatten(1, 2)
    d_near = SCRATCH.take("d_near", near, *near.shape)
    torch.bmm(flat(d_rows), lane.values.mT, out=flat(d_near))
    d_scores = torch.mul(near, d_near, out=SCRATCH.take("d_scores", near, *near.shape))
    d_sinks = torch.bmm(tokens.sink_v, rows.mT)
    mean = d_scores.sum(-1, keepdim=True)
    mean += (sinks * d_sinks).sum(1).view_as(mean)
    if factor is not None:
        answers = product(d_rows, weights.S[:, :-1].mT, "answers")
        answer = torch.mul(lane.phi_q, answers, out=lane.features).sum(-1, keepdim=True)
        mean.addcmul_(factor, answer)
    d.sink_v.add_(torch.bmm(sinks, rows))
    d_scores.addcmul_(near, mean, value=-1)
    d_sinks.sub_(mean.flatten(1)[:, None]).mul_(sinks)
    if tokens.conv is not None:
        taps = d_near.sum(1).unflatten(1, (-1, shape.chunk))
        d.conv.add_(diagonals(taps, shape, tokens.conv.shape[-1]).sum(2).flip(-1))
        near += lane.band
    put_products(d.v, near, d_rows, shape)
    if factor is not None:
        d_far = d_scores[..., : lane.far.shape[-1]].unflatten(2, (-1, shape.chunk))
        own = torch.mul(d_far, lane.far, out=SCRATCH.take("own", d_far, *d_far.shape))
        d_far -= own
        d.mix.copy_(own.sum(-1).view_as(d.mix)).addcmul_(
            factor, answer.addcmul_(mean, weights.mass, value=-1)
        )
        d_S, d_z = backward_far(shape, lane, weights, d_rows, d_near, mean, answers, d_S, d_z, d)
    d_q, d_rows_q = flat(d.q), d.q.flatten(1, 2)
    torch.baddbmm(d_q, flat(d_scores), lane.keys, beta=0, alpha=shape.scale, out=d_q)
    torch.baddbmm(d_rows_q, d_sinks.mT, tokens.sink_k, alpha=shape.scale, out=d_rows_q)
    d.sink_k.baddbmm_(d_sinks, lane.rows, alpha=shape.scale)
    put_products(d.k, d_scores, lane.q, shape, shape.scale)
    return d_S, d_z


def backward_far(
    shape: Shape,
    lane: Lane,
    weights: Weights,
    d_rows: Tensor,
    d_near: Tensor,
    mean: Tensor,
    answers: Tensor,
    d_S: Tensor,
    d_z: Tensor,
    d: Tokens,
) -> tuple[Tensor, Tensor]:
    """The part of `backward` that goes through features, from `d_near`, d_out · v of all columns; `mean`, its mean by
    the weights; and `answers`, `S d_out [N, n, g C, F]`.
    """
    factor, z = weights.factor, weights.z
    d_products = torch.sub(d_near[..., : lane.far.shape[-1]], mean, out=lane.products).mul_(factor)
    lane.tiles.mul_(lane.far)
    torch.bmm(lane.flat_products, lane.phi_keys, out=flat(d.phi_q))
    d.phi_q.addcmul_(factor, answers.addcmul_(mean, z[:, :-1, None], value=-1))
    scaled = torch.mul(lane.phi_q, factor, out=lane.features)
    d_S, d_sums = outside_gradients(shape, running_sums, (scaled, d_rows), d_S)
    masses = torch.bmm(flat(factor.mul_(mean).neg_().mT), lane.phi_queries).view_as(z[:, 1:])
    d_z, d_masses = outside_gradients(shape, running, (masses,), d_z)
    old = lane.old_phi.shape[1] * shape.chunk
    put_products(d.phi_k, d_products, lane.phi_q, shape)
    accumulate(d.v[:, :old], lane.old_phi, d_sums)
    d.phi_k[:, :old].unflatten(1, (-1, shape.chunk)).add_(d_masses[:, :, None])
    accumulate(d.phi_k[:, :old], lane.old_v, d_sums.mT)
    return d_S, d_z


def outside_gradients(
    shape: Shape, sums: Callable, rows: Sequence[Tensor], last: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of what is older than a lane and of its chunks of slots, from those of the sums before each chunk
    of rows, which are `sums` of rows the other way, and of the last sum.
    """
    total = sums(*rows, last, backwards=True)
    d_first, d_slots = total[:, 0], total[:, 1:]
    if shape.ahead:
        unread = total.new_zeros(len(total), shape.around, *total.shape[2:])
        before = sums(*rows, torch.zeros_like(last))[:, :-1]
        d_slots = torch.cat([d_slots, unread], 1) + torch.cat([unread, before], 1)
    return d_first, d_slots
