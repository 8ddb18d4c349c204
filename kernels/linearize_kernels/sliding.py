"""The sliding form in blocks: a softmax window, far features that are positive weights, one normaliser, the conv.

For every chunk of C queries the R slots before it and its own lie side by side, `R + C` columns. In each column a
token is near, far or not there, so one matrix of weights holds both parts, and with the conv as a band added to it one
product reads all the values. What is older than the columns is in S, the sum of `φ(k) vᵀ` of the chunks before. The
backward makes the weights again, so memory is linear in T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.combine import TINY

LOW = -1e30  # in the place of a maximum over nothing
CACHED = 1 << 18  # numbers in a matrix of weights that is worked on at a time, on a CPU


class Shape(NamedTuple):
    """What is not a tensor.

    Attributes:
        chunk: C; recent: R, at least the window's size and the conv's reach.
        size: of the window; scale: of its scores.
        start: the position of the first query row.
        skip: slots at the head of the timeline that are not there, or hold sinks.
    """

    chunk: int
    recent: int
    size: int
    scale: float
    start: int
    skip: int


class Tokens(NamedTuple):
    """A timeline of R + n C slots and n C query rows, for N heads of keys with g query heads each.

    Attributes:
        q: `[N, g, n C, D]`; k: `[N, R + n C, D]`; v: `[N, R + n C, Dv]`, zero where no token is.
        phi_q: `[N, g, n C, F]`; phi_k: `[N, R + n C, F]`, zero where no token or a sink is; mix: `[N, g, n C]`, the
            logarithm of the far part's factor, -inf where nothing is far; all None: no far part.
        conv: `[N, g, W]` or None.
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
        tokens = Tokens(*tensors)
        ctx.shape = shape
        ctx.save_for_backward(*tensors)
        out = torch.empty(*tokens.q.shape[:-1], tokens.v.shape[-1], dtype=tokens.q.dtype, device=tokens.q.device)
        S, z = tokens.S.clone(), tokens.z.clone()
        for some in lanes(shape, tokens):
            forward_lanes(shape, part(tokens, some), out[some], S[some], z[some])
        return out, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor, d_z: Tensor):
        tokens = Tokens(*ctx.saved_tensors)
        grads = Tokens(*(None if x is None else torch.empty_like(x) for x in tokens))
        for some in lanes(ctx.shape, tokens):
            backward_lanes(
                ctx.shape, part(tokens, some), part(grads, some), d_out[some], d_S[some], d_z[some]
            )
        return None, *grads


def lanes(shape: Shape, tokens: Tokens) -> list[slice]:
    """Heads that are worked on together: all on a GPU, as many on a CPU as its cache holds."""
    count, group, rows = tokens.q.shape[:3]
    together = count
    if tokens.q.device.type == "cpu":
        together = max(1, CACHED // (group * rows * (shape.recent + shape.chunk)))
    return [slice(first, first + together) for first in range(0, count, together)]


def part(tokens: Tokens, some: slice) -> Tokens:
    return Tokens(*(None if x is None else x[some] for x in tokens))


def windows(x: Tensor, shape: Shape, columns: int | None = None) -> Tensor:
    """The slots of every chunk's columns, or of the first ones: `[N, slots, X] -> [N, n, X, columns]`."""
    chunks = (x.shape[1] - shape.recent) // shape.chunk
    columns = shape.recent + shape.chunk if columns is None else columns
    return x[:, : (chunks - 1) * shape.chunk + columns].unfold(1, columns, shape.chunk)


def add_windows(total: Tensor, x: Tensor, shape: Shape) -> None:
    """The reverse of `windows`: adds `x [N, n, columns, X]` to the slots of `total [N, slots, X]`."""
    chunks = x.shape[1]
    for first in range(0, x.shape[2], shape.chunk):
        piece = x[:, :, first : first + shape.chunk]
        if piece.shape[2] == shape.chunk:
            slots = slice(first, first + chunks * shape.chunk)
            total[:, slots] += piece.flatten(1, 2)
        else:
            spots = total[:, first : first + (chunks - 1) * shape.chunk + piece.shape[2]]
            spots.unfold(1, piece.shape[2], shape.chunk).add_(piece.transpose(-1, -2))


def by_chunk(x: Tensor, shape: Shape) -> Tensor:
    """Query rows: `[N, g, n C, X] -> [N, n, g C, X]`."""
    return x.unflatten(2, (-1, shape.chunk)).transpose(1, 2).flatten(2, 3)


def by_head(x: Tensor, shape: Shape) -> Tensor:
    """The reverse of `by_chunk`."""
    return x.unflatten(2, (-1, shape.chunk)).transpose(1, 2).flatten(2, 3)


def masks(shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
    """The band of near columns, `[C, R + C]`, 0 within and -inf outside; and the far columns, `[C, R + C - size]`."""
    row = torch.arange(shape.chunk, device=like.device)[:, None]
    delay = shape.recent + row - torch.arange(shape.recent + shape.chunk, device=like.device)
    near = like.new_zeros(delay.shape).masked_fill_((delay < 0) | (delay >= shape.size), float("-inf"))
    return near, (delay[:, : shape.recent + shape.chunk - shape.size] >= shape.size).to(like.dtype)


def band(conv: Tensor, shape: Shape) -> Tensor:
    """The conv as weights of the columns: `[N, g, W] -> [N, 1, g C, R + C]`."""
    width, columns = conv.shape[-1], shape.recent + shape.chunk
    out = conv.new_zeros(*conv.shape[:2], shape.chunk, columns)
    diagonals(out, shape, width).copy_(conv.flip(-1)[:, :, None])
    return out.flatten(1, 2)[:, None]


def diagonals(x: Tensor, shape: Shape, width: int) -> Tensor:
    """The conv's columns of each row, its own last, of a contiguous `x [N, g, C, R + C]`: `[N, g, C, W]`, a view."""
    columns = x.shape[-1]
    first = x.storage_offset() + shape.recent - width + 1
    return x.as_strided((*x.shape[:3], width), (*x.stride()[:2], columns + 1, 1), first)


class Weights(NamedTuple):
    """Normalised weights of one step.

    Attributes:
        near: `[N, n, g C, R + C]`, of all columns, the far ones among them; sinks: `[N, n, g C, sinks]`.
        far: `[N, n, g C, 1]`, the factor of what S answers.
        S, z: before each chunk, `[N, n, F, Dv]` and `[N, n, F, 1]`.
    """

    near: Tensor
    sinks: Tensor
    far: Tensor | None
    S: Tensor | None
    z: Tensor | None


def weigh(shape: Shape, tokens: Tokens, q: Tensor, phi_q: Tensor | None) -> Weights:
    """q and phi_q `by_chunk`. Overwrites tokens.S and tokens.z with what they are after the timeline's first n C
    slots."""
    near_mask, far_mask = masks(shape, q)
    sinks = tokens.sink_k.shape[1]
    near = (q * shape.scale) @ windows(tokens.k, shape)
    tiles = near.unflatten(2, (-1, shape.chunk))
    tiles += near_mask
    if shape.skip:
        slots = near.new_zeros(1, tokens.k.shape[1], 1)
        slots[:, : shape.skip] = float("-inf")
        touched = -(-shape.skip // shape.chunk)
        near[:, :touched] += windows(slots, shape)[:, :touched]
    sink = (q.flatten(1, 2) * shape.scale) @ tokens.sink_k.transpose(-1, -2)
    sink = sink.unflatten(1, near.shape[1:3])
    if shape.start < sinks:
        position = shape.start + torch.arange(tokens.q.shape[2], device=q.device)
        hidden = (position[:, None] < torch.arange(sinks, device=q.device)).unflatten(0, (-1, 1, shape.chunk))
        sink.unflatten(2, (-1, shape.chunk)).masked_fill_(hidden, float("-inf"))
    ceiling = near.amax(-1, keepdim=True)
    if sinks:
        ceiling = torch.maximum(ceiling, sink.amax(-1, keepdim=True))
    if phi_q is None:
        ceiling.clamp_(min=LOW)
        near.sub_(ceiling).exp_()
        sink.sub_(ceiling).exp_()
        share = (near.sum(-1, keepdim=True) + sink.sum(-1, keepdim=True)).clamp_(min=TINY).reciprocal_()
        return Weights(near.mul_(share), sink.mul_(share), None, None, None)
    mix = by_chunk(tokens.mix[..., None], shape)
    ceiling = torch.maximum(ceiling, mix).clamp_(min=LOW)
    near.sub_(ceiling).exp_()
    sink.sub_(ceiling).exp_()
    factor = (mix - ceiling).exp_()
    columns = far_mask.shape[-1]
    products = phi_q @ windows(tokens.phi_k, shape, columns)
    tiles = products.unflatten(2, (-1, shape.chunk))
    tiles *= far_mask
    near[..., :columns].addcmul_(products, factor)
    S, z = sums(shape, tokens)
    total = torch.addcmul(near.sum(-1, keepdim=True), factor, phi_q @ z)
    share = total.add_(sink.sum(-1, keepdim=True)).clamp_(min=TINY).reciprocal_()
    return Weights(near.mul_(share), sink.mul_(share), factor.mul_(share), S, z)


def sums(shape: Shape, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """S and z before each chunk. tokens.S and tokens.z become what they are after the last."""
    old = slice(0, tokens.k.shape[1] - shape.recent)
    phi, v = (x[:, old].unflatten(1, (-1, shape.chunk)) for x in (tokens.phi_k, tokens.v))
    S, z = phi.transpose(-1, -2) @ v, phi.sum(-2)
    running(S.unbind(1), tokens.S)
    running(z.unbind(1), tokens.z)
    return S, z[..., None]


def running(chunks: Sequence[Tensor], total: Tensor) -> None:
    """In place, every chunk becomes the sum of `total` and those before it; `total` becomes the sum of all."""
    for chunk in chunks:
        own = chunk.clone()
        chunk.copy_(total)
        total += own


def forward_lanes(shape: Shape, tokens: Tokens, out: Tensor, S: Tensor, z: Tensor) -> None:
    """Fills `out`; S and z go on in place."""
    q, phi_q = by_chunk(tokens.q, shape), None
    if tokens.phi_q is not None:
        phi_q = by_chunk(tokens.phi_q, shape)
    weights = weigh(shape, tokens._replace(S=S, z=z), q, phi_q)
    near = weights.near if tokens.conv is None else weights.near.add_(band(tokens.conv, shape))
    rows = near @ windows(tokens.v, shape).transpose(-1, -2)
    rows += (weights.sinks.flatten(1, 2) @ tokens.sink_v).view_as(rows)
    if phi_q is not None:
        rows.addcmul_(weights.far, phi_q @ weights.S)
    out.copy_(by_head(rows, shape))


def backward_lanes(
    shape: Shape, tokens: Tokens, grads: Tokens, d_out: Tensor, d_S: Tensor, d_z: Tensor
) -> None:
    """Fills `grads`, from the gradients of what `sliding` returns.

    With weights w_j of one normaliser, `d log w_j = w_j (d_out · v_j - Σ_i w_i d_out · v_i)`, for far ones too.
    """
    q, d_rows = by_chunk(tokens.q, shape), by_chunk(d_out, shape)
    phi_q = None if tokens.phi_q is None else by_chunk(tokens.phi_q, shape)
    weights = weigh(shape, tokens._replace(S=tokens.S.clone(), z=tokens.z.clone()), q, phi_q)
    near, sinks, factor, S, z = weights
    d_near = d_rows @ windows(tokens.v, shape)
    d_sinks = (d_rows.flatten(1, 2) @ tokens.sink_v.transpose(-1, -2)).view_as(sinks)
    if tokens.conv is not None:
        taps = d_near.sum(1).unflatten(1, (-1, shape.chunk))
        grads.conv.copy_(diagonals(taps, shape, tokens.conv.shape[-1]).sum(2).flip(-1))
    for x in (grads.k, grads.v):
        x.zero_()
    grads.S.copy_(d_S)
    grads.z.copy_(d_z)
    weighted = near if tokens.conv is None else near + band(tokens.conv, shape)
    add_windows(grads.v, weighted.transpose(-1, -2) @ d_rows, shape)
    mean = (near * d_near).sum(-1, keepdim=True) + (sinks * d_sinks).sum(-1, keepdim=True)
    if phi_q is not None:
        answers = d_rows @ S.transpose(-1, -2)
        answer = (phi_q * answers).sum(-1, keepdim=True)
        mean.addcmul_(factor, answer)
    grads.sink_v.copy_(sinks.flatten(1, 2).transpose(-1, -2) @ d_rows.flatten(1, 2))
    d_near -= mean
    d_sinks = d_sinks.sub_(mean).mul_(sinks)
    d_scores = near.mul_(d_near)
    if phi_q is not None:
        _, far_mask = masks(shape, q)
        columns = far_mask.shape[-1]
        d_far = d_scores[..., :columns].unflatten(2, (-1, shape.chunk))
        own = d_far * far_mask
        d_far -= own
        grads.mix.copy_(
            by_head(
                own.sum(-1).flatten(2, 3)[..., None] + factor * (answer - mean * (phi_q @ z)), shape
            ).squeeze(-1)
        )
        d_products = d_near[..., :columns].mul(factor)
        tiles = d_products.unflatten(2, (-1, shape.chunk))
        tiles *= far_mask
        d_phi = d_products @ windows(tokens.phi_k, shape, columns).transpose(-1, -2)
        d_phi.addcmul_(factor, answers.addcmul_(mean, z.transpose(-1, -2), value=-1))
        grads.phi_q.copy_(by_head(d_phi, shape))
        scaled = phi_q * factor
        d_sums = scaled.transpose(-1, -2) @ d_rows
        d_masses = -(scaled.transpose(-1, -2) @ mean).squeeze(-1)
        running(d_sums.unbind(1)[::-1], grads.S)
        running(d_masses.unbind(1)[::-1], grads.z)
        old = slice(0, tokens.k.shape[1] - shape.recent)
        phi_k, v = (x[:, old].unflatten(1, (-1, shape.chunk)) for x in (tokens.phi_k, tokens.v))
        grads.v[:, old] += (phi_k @ d_sums).flatten(1, 2)
        grads.phi_k[:, old] = (v @ d_sums.transpose(-1, -2)).add_(d_masses[:, :, None]).flatten(1, 2)
        grads.phi_k[:, old.stop :] = 0
        add_windows(grads.phi_k, d_products.transpose(-1, -2) @ phi_q, shape)
    d_scores *= shape.scale
    d_q = d_scores @ windows(tokens.k, shape).transpose(-1, -2)
    d_sinks *= shape.scale
    d_q += (d_sinks.flatten(1, 2) @ tokens.sink_k).view_as(d_q)
    grads.q.copy_(by_head(d_q, shape))
    grads.sink_k.copy_(d_sinks.flatten(1, 2).transpose(-1, -2) @ q.flatten(1, 2))
    add_windows(grads.k, d_scores.transpose(-1, -2) @ q, shape)
