"""The sliding form in chunks: softmax in a window, positive far features, one normaliser, and the conv.

For every chunk of C queries, the R slots before it and its own lie side by side as columns. Each column is local or far
for each row. What is older than the columns is in S and z. All the far weight of a row enters the softmax as one more
score, `mix + log(mass)`, so a single softmax normalises the local scores, the sinks and the far part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.parts.combine import TINY
from linearize_kernels.torch_forms.chunks import (
    Tiling,
    band,
    by_chunk,
    by_head,
    columns,
    delays,
    product,
    sums_outside,
)

LOW = -1e30  # the score of what is not seen
# Before the sinks and the columns are two more: one takes all the weight of a row that sees nothing (it is in no
# sequence), the other stands for the whole far part.
NOTHING, FAR = 0, 1


@dataclass(frozen=True)
class Shape(Tiling):
    """The plain numbers of a timeline. R is at least the window's size and the conv's reach.

    Attributes:
        size: tokens in the window.
        scale: of the local scores.
        start: the position of the first query row. A row sees no sink that comes after it.
        skip: slots at the head of the timeline that are empty or hold sinks. The A slots at its end are empty too.
    """

    size: int
    scale: float
    start: int
    skip: int


class Tokens(NamedTuple):
    """A timeline of `s = R + n C + A` slots and n C query rows.

    Attributes:
        q: `[N, g, n C, D]`.
        k, v: `[N, s, D]` and `[N, s, Dv]`, zero in empty slots.
        phi_q, phi_k: `[N, g, n C, F]` and `[N, s, F]`, features. phi_k is zero in empty slots and for sinks. Both and
            mix are None if there is no far part.
        mix: `[N, g, n C]`, the logarithm of the far part's factor, -inf in rows that have nothing far.
        conv: `[N, g, W]` or None. Its taps count how far a slot is behind the row; where rows see ahead, plus `W // 2`.
        S, z: `[N, F, Dv]` and `[N, F]`, the state before the timeline.
        sink_k, sink_v: `[N, sinks, D]` and `[N, sinks, Dv]`.
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
    """Compute the outputs `[N, g, n C, Dv]`, and S and z after the first n C slots of the timeline."""
    values = with_front(tokens.sink_v, columns(tokens.v, shape))
    phi_q, phi_k, far = tokens.phi_q, tokens.phi_k, None
    if phi_q is not None and phi_k is not None:
        far = read_far(shape, tokens, phi_q, phi_k, values[:, :, -shape.columns :])
    weights = local_weights(shape, tokens, far)  # [N, n, g C, front + columns]
    total = weights
    if tokens.conv is not None:
        total = total + pad(band(tokens.conv, shape), (total.shape[-1] - shape.columns, 0))
    if far is None:
        return by_head(product(total, values), shape.chunk), tokens.S, tokens.z
    factor = weights[..., FAR, None] / far.mass[..., None]
    out = product(total, values) + factor * far.out
    return by_head(out, shape.chunk), far.S, far.z


class FarPart(NamedTuple):
    """What rows read of their far tokens, `[N, n, g C, Dv]`, its mass, `[N, n, g C]`, and the state after them."""

    out: Tensor
    mass: Tensor
    S: Tensor
    z: Tensor


def read_far(shape: Shape, tokens: Tokens, phi_q: Tensor, phi_k: Tensor, values: Tensor) -> FarPart:
    """Read the far tokens: through S and z outside a chunk's columns, one by one within them.

    Args:
        phi_q, phi_k: those of `tokens`.
        values: `[N, n, columns, Dv]`, of every chunk's columns.
    """
    phi_q = by_chunk(phi_q, shape.chunk)
    chunks, groups = phi_q.shape[1], tokens.q.shape[1]
    some = shape.columns if shape.ahead else shape.columns - shape.size  # of the columns may be far
    some_k = columns(phi_k, shape, some)
    if shape.ahead:
        slots = [x.unflatten(1, (-1, shape.chunk)) for x in (phi_k, tokens.v)]
    else:
        slots = [
            x[:, :, : shape.chunk] for x in (some_k, values)
        ]  # each chunk's columns begin with a chunk of slots
    S, S_after = sums_outside(tokens.S.flatten(1), product(slots[0].mT, slots[1]).flatten(2), shape, chunks)
    z, z_after = sums_outside(tokens.z, slots[0].sum(2), shape, chunks)

    delay = delays(shape, phi_q.device)[:, :some]
    is_far = delay.abs() >= shape.size if shape.ahead else delay >= shape.size
    products = phi_q @ some_k.mT * is_far.to(phi_q.dtype).repeat(groups, 1)
    mass = products.sum(-1) + (z[:, :, None] @ phi_q.mT).squeeze(2)
    out = product(products, values[:, :, :some]) + product(phi_q, S.unflatten(2, tokens.S.shape[1:]))
    return FarPart(out, mass.clamp_min(TINY), S_after.unflatten(1, tokens.S.shape[1:]), z_after)


def local_weights(shape: Shape, tokens: Tokens, far: FarPart | None) -> Tensor:
    """Compute the weights of the far part, the sinks and the local columns under one normaliser,
    `[N, n, g C, front + columns]`.
    """
    q = by_chunk(shape.scale * tokens.q, shape.chunk)
    keys = with_front(tokens.sink_k, columns(tokens.k, shape))
    heads, chunks, rows = q.shape[:3]
    seen = visible(shape, chunks, tokens.sink_k.shape[1], q.device)
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, LOW)
    bias[..., NOTHING] = LOW / 2
    bias = bias.repeat(heads if len(bias) > 1 else 1, rows // shape.chunk, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), keys.flatten(0, 1).mT).unflatten(0, (heads, chunks))
    if far is not None and tokens.mix is not None:
        mix = by_chunk(tokens.mix[..., None], shape.chunk).squeeze(-1)
        scores[..., FAR] = (mix + far.mass.log()).clamp_min(LOW)
    return scores.softmax(-1)


def with_front(sinks: Tensor, columns: Tensor) -> Tensor:
    """Put NOTHING and FAR, which are zero, and the sinks before the columns of every chunk."""
    front = pad(sinks, (0, 0, 2, 0))[:, None]
    return torch.cat([front.expand(-1, columns.shape[1], -1, -1), columns], 2)


def visible(shape: Shape, chunks: int, sinks: int, device: torch.device) -> Tensor:
    """Compute which columns have a local score, `[n, C, front + columns]` bool, or with one chunk if all are alike.

    FAR has none: its score is written later.
    """
    delay = delays(shape, device)
    near = delay.abs() < shape.size if shape.ahead else (delay >= 0) & (delay < shape.size)
    near = pad(near, (sinks, 0), value=True)[None]
    if shape.skip > 0 or shape.ahead or shape.start < sinks:
        slot = torch.arange(shape.recent + chunks * shape.chunk + shape.ahead, device=device)
        there = (slot >= shape.skip) & (slot < len(slot) - shape.ahead)
        there = there.unfold(0, shape.columns, shape.chunk)[:, None].expand(-1, shape.chunk, -1)
        position = shape.start + torch.arange(chunks * shape.chunk, device=device)
        earlier = position[:, None] >= torch.arange(sinks, device=device)
        near = near & torch.cat([earlier.unflatten(0, (chunks, -1)), there], -1)
    return pad(near, (2, 0), value=False)
