"""The sliding form in blocks: a softmax window, far features that are positive weights, one normaliser, the conv.

For every chunk of C queries the R slots before it, its own and the A ahead of it lie side by side, `R + C + A` columns.
In each column a token is near, far or not there, so one matrix of weights holds both parts, and with the conv as a band
added to it one product reads all the values. What is older than the columns is in S, the sum of `φ(k) vᵀ` of the chunks
before, and where rows see ahead of those behind the columns too. The backward makes the weights again, so memory is
linear in T.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.sliding_lane import LOW, Beside, Gradients, Lane, Shape, Tokens
from linearize_kernels.torch_forms.tiles import (
    accumulate,
    band,
    by_chunk,
    by_head,
    diagonals,
    flat,
    put_columns,
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
        d = Gradients(lane, by_chunk(d_out, shape), new)
        d.sink_k, d.sink_v = (torch.zeros_like(x) for x in (tokens.sink_k, tokens.sink_v))
        d.conv = None if tokens.conv is None else torch.zeros_like(tokens.conv)
        with torch.autocast(tokens.q.device.type, enabled=False):
            d_S, d_z = backward(shape, lane, tokens, d, d_S, d_z)
        d_q, d_phi_q, d_mix = (None if x is None else by_head(x, shape) for x in (d.q, d.phi_q, d.mix))
        d_mix = None if d_mix is None else d_mix.squeeze(-1)
        return None, d_q, d.k, d.v, d_phi_q, d.phi_k, d_mix, d.conv, d_S, d_z, d.sink_k, d.sink_v


def lane_of(shape: Shape, tokens: Tokens) -> Lane:
    mix = None if tokens.mix is None else by_chunk(tokens.mix[..., None], shape)
    q, phi_q = (None if x is None else by_chunk(x, shape) for x in (tokens.q, tokens.phi_q))
    lane = Lane(shape, tokens.sink_k.shape[1], q, tokens.k, tokens.v, phi_q, tokens.phi_k, mix)
    lane.band = None if tokens.conv is None else band(tokens.conv, shape)
    lane.gather()
    return lane


def new(name: str, like: Tensor, *shape: int) -> Tensor:
    """As `Scratch.take`, to be kept."""
    return like.new_empty(shape)


def weigh(shape: Shape, lane: Lane, tokens: Tokens | Beside) -> Tensor | None:
    """Makes a lane's weights, products and S, and returns z outside each chunk's columns and after the last chunk,
    `[N, n + 1, F]`.

    No row has the first column near: in its place the softmax over the near columns gets the logarithm of all the
    weight that is not near, so that it normalises everything at once.
    """
    z, (lanes, chunks, rows) = None, lane.q.shape[:3]
    torch.bmm(shape.scale * tokens.sink_k, lane.q.flatten(1, 2).mT, out=lane.sinks)
    hide_later(shape, lane)
    if lane.phi_q is None:
        lane.factor.fill_(LOW)
    else:
        z = weigh_far(shape, lane, tokens)
        torch.log(lane.total, out=lane.factor).add_(lane.mix).clamp_(min=LOW)
    torch.baddbmm(lane.near, flat(lane.q), lane.keys.mT, alpha=shape.scale, out=flat(lane.scores))
    hide_absent(shape, lane.scores)
    # The ceiling is far above the scores of a row that sees nothing.
    torch.amax(lane.others, 1, keepdim=True, out=lane.ceiling).clamp_(min=LOW / 2)
    lane.others.sub_(lane.ceiling).exp_()
    torch.sum(lane.others, 1, keepdim=True, out=lane.shares).clamp_(min=TINY)
    ceiling, shares = (x.view(lanes, chunks, rows) for x in (lane.ceiling, lane.shares))
    torch.add(ceiling, shares.log(), out=lane.first)
    torch.softmax(lane.scores, -1, out=lane.scores)
    torch.div(lane.first, shares, out=ceiling)
    lane.others.mul_(lane.ceiling)
    lane.first.zero_()
    if lane.phi_q is not None:
        lane.factor.div_(lane.total)
    return z


def weigh_far(shape: Shape, lane: Lane, tokens: Tokens | Beside) -> Tensor:
    """Makes a lane's S, products, their mass and their total; returns z as `weigh` does."""
    chunks, phi_q = lane.q.shape[1], flat(lane.phi_q)
    running_sums(lane.old_phi[:, :chunks], lane.old_v[:, :chunks], tokens.S, out=lane.S)
    slots = lane.old_phi.sum(-2)
    z = running(slots[:, :chunks], tokens.z)
    if shape.ahead:
        ahead = lane.old_phi[:, -chunks:], lane.old_v[:, -chunks:]
        lane.S[:, :-1].add_(running_sums(*ahead, torch.zeros_like(tokens.S), backwards=True)[:, 1:])
        z[:, :-1].add_(running(slots[:, -chunks:], torch.zeros_like(tokens.z), backwards=True)[:, 1:])
    torch.bmm(phi_q, lane.phi_keys.mT, out=flat(lane.products))
    lane.tiles.mul_(lane.far)
    # A product with one column would take six times as long as with one row.
    torch.bmm(flat(z[:, :-1, None]), phi_q.mT, out=flat(lane.mass).mT)
    torch.sum(lane.products, -1, keepdim=True, out=lane.total).add_(lane.mass).clamp_(min=TINY)
    return z


def hide_later(shape: Shape, lane: Lane) -> None:
    """Lower the scores of sinks that come after a query."""
    count, (chunks, rows) = lane.sinks.shape[1], lane.q.shape[1:3]
    if shape.start < count:
        position = shape.start + torch.arange(chunks * shape.chunk, device=lane.q.device)
        position = position.view(chunks, 1, -1).expand(-1, rows // shape.chunk, -1).flatten()
        lane.sinks.masked_fill_(position < torch.arange(count, device=position.device)[:, None], LOW)


def hide_absent(shape: Shape, scores: Tensor) -> None:
    """Lower the scores `[N, n, g C, R + C + A]` of slots that are not there."""
    chunks, columns = scores.shape[1], scores.shape[3]
    for i in range(min(chunks, -(-shape.skip // shape.chunk))):
        scores[:, i, :, : shape.skip - i * shape.chunk] = LOW
    for i in range(min(chunks, -(-shape.ahead // shape.chunk))):
        scores[:, -1 - i, :, columns - shape.ahead + i * shape.chunk :] = LOW


def add_far(lane: Lane) -> None:
    """Makes the weights of all columns of those of the near ones."""
    if lane.phi_q is not None:
        lane.far_scores.addcmul_(lane.products, lane.factor)


def forward(shape: Shape, lane: Lane, tokens: Tokens | Beside, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the outputs of tokens that lie in a lane to `out [N, n, g C, Dv]`, and returns S and z with its first n C
    slots, in its memory.
    """
    z = weigh(shape, lane, tokens)
    total, rows = flat(out), out.flatten(1, 2)
    if lane.phi_q is None:
        torch.bmm(lane.sinks.mT, tokens.sink_v, out=rows)
    else:
        torch.bmm(flat(lane.phi_q), flat(lane.S[:, :-1]), out=total)
        out.mul_(lane.factor)
        torch.baddbmm(rows, lane.sinks.mT, tokens.sink_v, out=rows)
    if lane.band is not None:
        lane.scores.add_(lane.band)
    add_far(lane)
    torch.baddbmm(total, flat(lane.scores), lane.values, out=total)
    return (tokens.S, tokens.z) if z is None else (lane.S[:, -1], z[:, -1])


def backward(
    shape: Shape, lane: Lane, tokens: Tokens | Beside, d: Gradients, d_S: Tensor, d_z: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes the gradients of tokens that lie in a lane, from those of the outputs, in d, and of S and z after them;
    returns those of S and z before.

    With weights w_j of one normaliser, `d log w_j = w_j (d_out · v_j - Σ_i w_i d_out · v_i)`, for far ones too.
    """
    z = weigh(shape, lane, tokens)
    add_far(lane)
    rows, d_rows = lane.q.flatten(1, 2), d.out.flatten(1, 2)
    mean = d.mean.view(len(rows), 1, -1)
    torch.bmm(flat(d.out), lane.values.mT, out=flat(d.near))
    torch.mul(lane.scores, d.near, out=d.scores)
    torch.bmm(tokens.sink_v, d_rows.mT, out=d.sinks)
    torch.sum(d.scores, -1, keepdim=True, out=d.mean)
    mean.add_((lane.sinks * d.sinks).sum(1, keepdim=True))
    if lane.phi_q is not None:
        torch.bmm(flat(d.out), flat(lane.S[:, :-1]).mT, out=flat(d.answers))
        answer = torch.mul(lane.phi_q, d.answers, out=lane.features).sum(-1, keepdim=True)
        d.mean.addcmul_(lane.factor, answer)
    d.sink_v.baddbmm_(lane.sinks, d_rows)
    d.scores.addcmul_(lane.scores, d.mean, value=-1)
    d.sinks.sub_(mean).mul_(lane.sinks)
    if d.conv is not None:
        taps = d.near.sum(1).unflatten(1, (-1, shape.chunk))
        d.conv.add_(diagonals(taps, shape, d.conv.shape[-1]).sum(2).flip(-1))
        lane.scores.add_(lane.band)
    put_columns(d.v, lane.scores, d.out, shape)
    if lane.phi_q is not None:
        far_scores = d.scores[..., : lane.far.shape[-1]].unflatten(2, (-1, shape.chunk))
        own = far_scores * lane.far
        far_scores.sub_(own)
        torch.sum(own, -1, out=d.mix.view(own.shape[:-1]))
        d.mix.addcmul_(lane.factor, answer.addcmul_(d.mean, lane.mass, value=-1))
        d_S, d_z = backward_far(shape, lane, d, z, d_S, d_z)
    torch.baddbmm(flat(d.q), flat(d.scores), lane.keys, beta=0, alpha=shape.scale, out=flat(d.q))
    d_queries = d.q.flatten(1, 2)
    torch.baddbmm(d_queries, d.sinks.mT, tokens.sink_k, alpha=shape.scale, out=d_queries)
    d.sink_k.baddbmm_(d.sinks, rows, alpha=shape.scale)
    put_columns(d.k, d.scores, lane.q, shape, shape.scale)
    return d_S, d_z


def backward_far(
    shape: Shape, lane: Lane, d: Gradients, z: Tensor, d_S: Tensor, d_z: Tensor
) -> tuple[Tensor, Tensor]:
    """The part of `backward` that goes through features."""
    torch.sub(d.near[..., : lane.far.shape[-1]], d.mean, out=lane.products).mul_(lane.factor)
    lane.tiles.mul_(lane.far)
    torch.bmm(flat(lane.products), lane.phi_keys, out=flat(d.phi_q))
    d.phi_q.addcmul_(lane.factor, d.answers.addcmul_(d.mean, z[:, :-1, None], value=-1))
    scaled = torch.mul(lane.phi_q, lane.factor, out=lane.features)
    sums = running_sums(scaled, d.out, d_S, backwards=True, out=d.S)
    d_S, d_sums = outside_gradients(shape, sums, partial(running_sums, scaled, d.out))
    lane.factor.mul_(d.mean).neg_()
    masses = torch.bmm(flat(lane.factor.mT), flat(lane.phi_q)).view_as(z[:, 1:])
    d_z, d_masses = outside_gradients(shape, running(masses, d_z, backwards=True), partial(running, masses))
    put_columns(d.phi_k, lane.products, lane.phi_q, shape)
    d_old_v, d_old_phi = (x[:, : lane.old_phi.shape[1] * shape.chunk] for x in (d.v, d.phi_k))
    accumulate(d_old_v, lane.old_phi, d_sums)
    d_old_phi.view_as(lane.old_phi).add_(d_masses[:, :, None])
    accumulate(d_old_phi, lane.old_v, d_sums.mT)
    return d_S, d_z


def outside_gradients(
    shape: Shape, sums: Tensor, sums_before: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of what is older than a lane and of its chunks of slots, from those of the sums before each chunk
    of rows, summed backwards, and of what summed forwards from its argument on.
    """
    d_first, d_slots = sums[:, 0].clone(), sums[:, 1:]
    if shape.ahead:
        unread = sums.new_zeros(len(sums), shape.around, *sums.shape[2:])
        before = sums_before(torch.zeros_like(d_first))[:, :-1]
        d_slots = torch.cat([d_slots, unread], 1) + torch.cat([unread, before], 1)
    return d_first, d_slots
