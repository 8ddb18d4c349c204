"""The sliding form in blocks: a softmax window, far features that are positive weights, one normaliser, the conv.

For every chunk of C queries the R slots before it, its own and the A ahead of it lie side by side, `R + C + A` columns.
In each column a token is near, far or not there, so one matrix of weights holds both parts, and with the conv as a band
added to it one product reads all the values. What is older than the columns is in S, the sum of `φ(k) vᵀ` of the chunks
before, and where rows see ahead of those behind the columns too. The backward makes the weights again, so memory is
linear in T.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.combine import TINY
from linearize_kernels.scratch import SCRATCH
from linearize_kernels.tiles import (
    Tiling,
    add_windows,
    band,
    by_chunk,
    by_head,
    diagonals,
    product,
    running,
    windows,
)

LOW = -1e30  # the score of what is not seen


@dataclass(frozen=True)
class Shape(Tiling):
    """What is not a tensor; R is at least the window's size and the conv's reach.

    Attributes:
        size: of the window; scale: of its scores.
        start: the position of the first query row; no row sees a sink that comes after it. At least the number of
            sinks: every row sees all.
        skip: slots at the head of the timeline that are not there, or hold sinks. Those A at its end are not there.
    """

    size: int
    scale: float
    start: int
    skip: int


class Tokens(NamedTuple):
    """A timeline of `s = R + n C + A` slots and n C query rows, for N heads of keys with g query heads each.

    Attributes:
        q: `[N, g, n C, D]`; k: `[N, s, D]`; v: `[N, s, Dv]`, zero where no token is.
        phi_q: `[N, g, n C, F]`; phi_k: `[N, s, F]`, zero where no token or a sink is; mix: `[N, g, n C]`, the logarithm
            of the far part's factor, -inf where nothing is far; all None: no far part.
        conv: `[N, g, W]`, by how far behind the row a slot is, or where rows see ahead by that plus `W div 2`; or None.
        S, z: `[N, F, Dv]`, `[N, F]`: what is older than the timeline.
        sink_k, sink_v: `[N, sinks, D]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    mix: Tensor | None
    conv: Tensor | None
    S: Tensor
    z: Tensor
    sink_k: Tensor
    sink_v: Tensor


def sliding(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[N, g, n C, Dv]`, and S and z with the timeline's first n C slots."""
    return Sliding.apply(shape, *tokens)


class Sliding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: Shape, *tensors: Tensor | None):
        ctx.shape = shape
        ctx.save_for_backward(*tensors)
        return forward(shape, Tokens(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor, d_z: Tensor):
        return None, *backward(ctx.shape, Tokens(*ctx.saved_tensors), d_out, d_S, d_z)


def masks(shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
    """The band of near columns, `[C, R + C + A]`, 0 within and LOW outside; and the far ones, of all columns or,
    without slots ahead, of the first `R + C - size`.
    """
    return masks_of(shape.chunk, shape.recent, shape.ahead, shape.size, like.dtype, like.device)


@lru_cache(64)
def masks_of(
    chunk: int, recent: int, ahead: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    columns = recent + chunk + ahead
    with torch.inference_mode(False):
        delay = recent + torch.arange(chunk, device=device)[:, None] - torch.arange(columns, device=device)
        if ahead:
            far = delay.abs() >= size
            not_near = far
        else:
            far = delay[:, : columns - size] >= size
            not_near = (delay < 0) | (delay >= size)
        near = torch.zeros(delay.shape, dtype=dtype, device=device).masked_fill_(not_near, LOW)
        return near, far.to(dtype)


class Weights(NamedTuple):
    """Weights of one step.

    Attributes:
        near: `[N, n, g C, R + C + A]`, a softmax over the near columns alone; products: φφ of the far ones, of as many
            columns as `masks` says; sinks: `[N, sinks, n g C]`, normalised.
        share, factor: `[N, n, g C, 1]`, what near and products (and what is read of S) are to be multiplied by.
        S, z: outside each chunk's columns, and after the last chunk, `[N, n + 1, F, Dv]` and `[N, n + 1, F]`.
        mass: what is read of z, `[N, n, g C, 1]`.
    """

    near: Tensor
    sinks: Tensor
    share: Tensor
    products: Tensor | None = None
    factor: Tensor | None = None
    S: Tensor | None = None
    z: Tensor | None = None
    mass: Tensor | None = None

    def columns(self, band: Tensor | None) -> Tensor:
        """The normalised weights of all columns, with the conv's, in the memory of near."""
        near = self.near
        near = near.mul_(self.share) if band is None else torch.addcmul(band, near, self.share, out=near)
        if self.products is not None:
            near[..., : self.products.shape[-1]].addcmul_(self.products, self.factor)
        return near


def weigh(shape: Shape, tokens: Tokens, q: Tensor, phi_q: Tensor | None) -> Weights:
    """q and phi_q are `by_chunk`. The near part goes through `softmax`, which is one pass where its steps are five; its
    normaliser is then the inverse of its largest weight.
    """
    near_mask, far_mask = masks(shape, q)
    keys = windows(tokens.k, shape)
    scores = SCRATCH.take("scores", q, *q.shape[:3], keys.shape[2])
    mask = near_mask.repeat(q.shape[2] // shape.chunk, 1)
    operands = (x.flatten(0, 1) for x in (q, keys.mT))
    torch.baddbmm(mask, *operands, alpha=shape.scale, out=scores.flatten(0, 1))
    slots, chunks = tokens.k.shape[1], scores.shape[1]
    for absent, touched in (
        (slice(0, shape.skip), slice(0, -(-shape.skip // shape.chunk))),
        (slice(slots - shape.ahead, slots), slice(max(0, chunks - -(-shape.ahead // shape.chunk)), chunks)),
    ):
        if absent.start < absent.stop:
            mark = scores.new_zeros(1, slots, 1)
            mark[:, absent] = LOW
            scores[:, touched] += windows(mark, shape)[:, touched].mT
    peak, near = scores.amax(-1, keepdim=True), torch.softmax(scores, -1, out=scores)
    sinks = sink_scores(shape, tokens, q)
    ceiling = peak
    if sinks.shape[1]:
        ceiling = torch.maximum(ceiling, sinks.amax(1).view_as(peak))
    mix = None if phi_q is None else by_chunk(tokens.mix[..., None], shape)
    if mix is not None:
        ceiling = torch.maximum(ceiling, mix)
    ceiling = ceiling.clamp(min=LOW / 2)  # far above the scores of a query that sees nothing
    sinks.sub_(ceiling.flatten(1)[:, None]).exp_()
    share = (peak - ceiling).exp_().div_(near.amax(-1, keepdim=True))
    total = share + sinks.sum(1).view_as(peak)
    products = factor = S = z = read = None
    if phi_q is not None:
        products = product(phi_q, windows(tokens.phi_k, shape, far_mask.shape[-1]).mT, "products")
        products.unflatten(2, (-1, shape.chunk)).mul_(far_mask)
        factor = (mix - ceiling).exp_()
        S, z = sums(shape, tokens)
        read = mass(phi_q, z)
        total.addcmul_(factor, read + products.sum(-1, keepdim=True))
    total.clamp_(min=TINY)
    sinks.div_(total.flatten(1)[:, None])
    return Weights(
        near, sinks, share.div_(total), products, None if factor is None else factor.div_(total), S, z, read
    )


def sink_scores(shape: Shape, tokens: Tokens, q: Tensor) -> Tensor:
    """`[N, sinks, n g C]`; a query that comes before a sink does not see it."""
    scores = (shape.scale * tokens.sink_k) @ q.flatten(1, 2).mT
    count = scores.shape[1]
    if shape.start < count:
        position = by_chunk(
            (shape.start + torch.arange(tokens.q.shape[2], device=scores.device))[None, None, :, None].expand(
                1, tokens.q.shape[1], -1, 1
            ),
            shape,
        )
        scores.masked_fill_(position.flatten() < torch.arange(count, device=scores.device)[:, None], LOW)
    return scores


def sums(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """S and z outside each chunk's columns, and after the last chunk."""
    phi_k, v = old_slots(shape, tokens)
    return outside(shape, product(phi_k.mT, v, "written"), tokens.S, "S"), outside(
        shape, phi_k.sum(-2), tokens.z
    )


def old_slots(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """phi_k and v of the slots that S and z take in, `[N, n or more, C, X]`."""
    old = slice(0, tokens.q.shape[2] + shape.around * shape.chunk)
    return tuple(x[:, old].unflatten(1, (-1, shape.chunk)) for x in (tokens.phi_k, tokens.v))


def outside(shape: Shape, slots: Tensor, first: Tensor, name: str | None = None) -> Tensor:
    """Sums of `first [N, ...]` and of the chunks of slots `[N, n + around, ...]` that are not in each chunk's columns;
    the last is of all before those behind the last chunk's first: `[N, n + 1, ...]`.
    """
    chunks = slots.shape[1] - shape.around
    total = running(slots[:, :chunks], first, name=name)
    if shape.ahead:
        behind = slots[:, shape.around :]
        total[:, :-1] += running(behind, torch.zeros_like(first), backwards=True)[:, 1:]
    return total


def outside_gradients(shape: Shape, rows: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `first` and `slots`, from those of what `outside` returns: of its first n, and of its last."""
    total = running(rows, last, backwards=True)
    d_first, d_slots = total[:, 0], total[:, 1:]
    if shape.ahead:
        unread = rows.new_zeros(len(rows), shape.around, *rows.shape[2:])
        before = running(rows, torch.zeros_like(last))[:, :-1]
        d_slots = torch.cat([d_slots, unread], 1) + torch.cat([unread, before], 1)
    return d_first, d_slots


def mass(phi_q: Tensor, z: Tensor) -> Tensor:
    """What is read of z before each chunk, `[N, n, g C, 1]`. A product with one column takes twice as long."""
    room = SCRATCH.take("written", phi_q, *phi_q.shape)
    return torch.mul(phi_q, z[:, :-1, None], out=room).sum(-1, keepdim=True)


def forward(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What `sliding` returns."""
    q = by_chunk(tokens.q, shape)
    phi_q = None if tokens.phi_q is None else by_chunk(tokens.phi_q, shape)
    weights = weigh(shape, tokens, q, phi_q)
    near = weights.columns(None if tokens.conv is None else band(tokens.conv, shape))
    rows = product(near, windows(tokens.v, shape))
    rows += product(weights.sinks.mT, tokens.sink_v, "products").reshape(rows.shape)
    if phi_q is None:
        return by_head(rows, shape), tokens.S.clone(), tokens.z.clone()
    rows.addcmul_(weights.factor, product(phi_q, weights.S[:, :-1], "products"))
    return by_head(rows, shape), weights.S[:, -1].clone(), weights.z[:, -1].clone()


def backward(shape: Shape, tokens: Tokens, d_out: Tensor, d_S: Tensor, d_z: Tensor) -> Tokens:
    """The gradients of `tokens`, from those of what `sliding` returns.

    With weights w_j of one normaliser, `d log w_j = w_j (d_out · v_j - Σ_i w_i d_out · v_i)`, for far ones too.
    """
    d_phi_q = d_phi_k = d_mix = d_conv = None
    q, d_rows = by_chunk(tokens.q, shape), by_chunk(d_out, shape)
    phi_q = None if tokens.phi_q is None else by_chunk(tokens.phi_q, shape)
    weights = weigh(shape, tokens, q, phi_q)
    near, sinks, factor, S, z = weights.columns(None), weights.sinks, weights.factor, weights.S, weights.z
    d_near = product(d_rows, windows(tokens.v, shape).mT, "d_near")
    d_sinks = tokens.sink_v @ d_rows.flatten(1, 2).mT
    if tokens.conv is not None:
        taps = d_near.sum(1).unflatten(1, (-1, shape.chunk))
        d_conv = diagonals(taps, shape, tokens.conv.shape[-1]).sum(2).flip(-1)
    d_k, d_v = torch.zeros_like(tokens.k), torch.zeros_like(tokens.v)
    room = SCRATCH.take("columns", near, *near.shape)
    weighted = near if tokens.conv is None else torch.add(near, band(tokens.conv, shape), out=room)
    add_windows(d_v, product(weighted.mT, d_rows, "added"), shape)
    mean = torch.mul(near, d_near, out=room).sum(-1, keepdim=True)
    mean += (sinks * d_sinks).sum(1).view_as(mean)
    if phi_q is not None:
        answers = product(d_rows, S[:, :-1].mT, "answers")
        features = SCRATCH.take("features", phi_q, *phi_q.shape)
        answer = torch.mul(phi_q, answers, out=features).sum(-1, keepdim=True)
        mean.addcmul_(factor, answer)
    d_sink_v = sinks @ d_rows.flatten(1, 2)
    d_near -= mean
    d_sinks.sub_(mean.flatten(1)[:, None]).mul_(sinks)
    d_scores = near.mul_(d_near)
    if phi_q is not None:
        _, far_mask = masks(shape, q)
        columns = far_mask.shape[-1]
        d_far = d_scores[..., :columns].unflatten(2, (-1, shape.chunk))
        own = d_far * far_mask
        d_far -= own
        d_mix = own.sum(-1).flatten(2, 3)[..., None] + factor * (answer - mean * weights.mass)
        d_mix = by_head(d_mix, shape).squeeze(-1)
        d_products = SCRATCH.take("products", d_near, *d_near.shape[:3], columns)
        torch.mul(d_near[..., :columns], factor, out=d_products)
        tiles = d_products.unflatten(2, (-1, shape.chunk))
        tiles *= far_mask
        d_phi = d_products @ windows(tokens.phi_k, shape, columns)
        d_phi.addcmul_(factor, answers.addcmul_(mean, z[:, :-1, None], value=-1))
        d_phi_q = by_head(d_phi, shape)
        scaled = torch.mul(phi_q, factor, out=features)
        d_S, d_sums = outside_gradients(shape, product(scaled.mT, d_rows, "written"), d_S)
        d_z, d_masses = outside_gradients(shape, scaled.mul_(mean).sum(-2).neg_(), d_z)
        phi_k, v = old_slots(shape, tokens)
        old = phi_k.shape[1] * shape.chunk
        d_v[:, :old] += product(phi_k, d_sums, "added").flatten(1, 2)
        d_phi_k = torch.empty_like(tokens.phi_k)
        d_phi_k[:, old:] = 0
        own = product(v, d_sums.mT, "answers")
        torch.add(own, d_masses[:, :, None], out=d_phi_k[:, :old].unflatten(1, (-1, shape.chunk)))
        add_windows(d_phi_k, product(d_products.mT, phi_q, "answers"), shape)
    d_scores *= shape.scale
    d_q = product(d_scores, windows(tokens.k, shape))
    d_sinks *= shape.scale
    d_q += product(d_sinks.mT, tokens.sink_k, "products").reshape(d_q.shape)
    d_sink_k = d_sinks @ q.flatten(1, 2)
    add_windows(d_k, product(d_scores.mT, q, "added"), shape)
    d_q = by_head(d_q, shape)
    return Tokens(d_q, d_k, d_v, d_phi_q, d_phi_k, d_mix, d_conv, d_S, d_z, d_sink_k, d_sink_v)
