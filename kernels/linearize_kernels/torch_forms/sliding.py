"""The sliding form in torch: softmax in a window, positive far features, one normaliser for both, and the
conv.

A chunk of C query rows reads R + C slots one by one (its columns): its own tokens and the R slots before
them. Each column is local or far for each row. Older tokens are read through S and z. The whole linear part
of a row enters the softmax as one more score, `mix + log(φ(q) z)`. So a single softmax normalises the local
scores, the sinks and the linear part.
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

LOW = -1e30  # the score of a column that a row does not see
# The indices of two extra columns, in front of the sinks and the chunk's columns. NOTHING takes all the weight
# of a row that sees no token (it is in no sequence). FAR stands for the whole far part.
NOTHING, FAR = 0, 1


@dataclass(frozen=True)
class Shape(Tiling):
    """The sizes of the sliding form's inputs, a sequence of keys (the timeline) and chunks of queries.

    R (`recent`) is at least the window's size and the conv's reach.

    Attributes:
        size: tokens in the window.
        scale: the factor of q·k in the local scores.
        start: the position of the first query row. A row does not see sinks at later positions.
        skip: the number of slots at the head of the timeline that are empty or hold sinks, and are not read
            there. The A slots at its end are empty too.
    """

    size: int
    scale: float
    start: int
    skip: int


class Tokens(NamedTuple):
    """The inputs of softmax in a sliding window with linear attention to older tokens: `s = R + n C + A`
    keys, n C queries.

    N is batch x heads of S, and g is the number of query heads that read one head of S. Row t is a query, and
    its token's key is in slot R + t.

    Attributes:
        q: `[N, g, n C, D]`.
        k, v: `[N, s, D]` and `[N, s, Dv]`. The slots in `Shape.skip` and the last A are not read.
        phi_q, phi_k: `[N, g, n C, F]` and `[N, s, F]`, the features of queries and keys, or None without a
            linear part. phi_k is zero in empty slots and for sinks.
        mix: `[N, g, n C]`, the logit of the linear part, -inf in rows for which it has no tokens. None
            without a linear part.
        conv: the conv's weights `[N, g, W]`, or None. Weight τ is for the slot τ before the row, or
            `τ - W // 2` before it if rows see ahead.
        S, z: `[N, F, Dv]` and `[N, F]`, the state before the first slot. Triton takes None for packed
            sequences.
        sink_k, sink_v: `[N, sinks, D]` and `[N, sinks, Dv]`. Triton takes None for packed sequences.
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
    """Compute softmax in a sliding window joined with linear attention to older tokens, for n chunks of C
    queries.

    Returns:
        The outputs `[N, g, n C, Dv]`, and S and z after the first n C keys. Without a linear part, S and z
        are the given ones.
    """
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
    """The sums that all queries have read through the linear part, and the state after them. A chunk has C queries in
    g heads.

    Attributes:
        out: the numerator, `[N, n, g C, Dv]`.
        mass: its normaliser, `[N, n, g C]`.
        S, z: the state after the n chunks, `[N, F, Dv]` and `[N, F]`.
    """

    out: Tensor
    mass: Tensor
    S: Tensor
    z: Tensor


def read_far(shape: Shape, tokens: Tokens, phi_q: Tensor, phi_k: Tensor, values: Tensor) -> FarPart:
    """Read the linear part: tokens outside the window by their keys if the chunk reads these anyway, all
    older ones by S and z.

    Args:
        phi_q, phi_k: the features in `tokens`, which are not None here.
        values: `[N, n, R + C + A, Dv]`, the values that each chunk reads.
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
    """Compute the softmax weights of every query, `[N, n, g C, 2 + sinks + R + C + A]`.

    The last dimension has: a column NOTHING for queries that see no token, a column FAR for the whole linear
    part, the sinks, and the R + C + A keys that the chunk reads directly. Keys outside the window have weight
    0, because FAR holds their weight. If `far` is None, FAR has weight 0 as well.
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
    """Put two zero columns and the sinks in front of the keys (or values) that each chunk reads.

    The two columns have no key: NOTHING (0) is for rows that see no token, and FAR (1) for the linear part as
    a whole. The caller sets their scores.

    Args:
        sinks: `[N, sinks, X]`, the sinks' keys or values.
        columns: `[N, n, columns, X]`, the keys or values that each chunk reads.

    Returns:
        `[N, n, 2 + sinks + columns, X]`.
    """
    front = pad(sinks, (0, 0, 2, 0))[:, None]
    return torch.cat([front.expand(-1, columns.shape[1], -1, -1), columns], 2)


def visible(shape: Shape, chunks: int, sinks: int, device: torch.device) -> Tensor:
    """Compute which keys are local (a sink or in the window) for each of the C queries of n chunks.

    Args:
        chunks: n.
        sinks: the number of sinks.

    Returns:
        `[n or 1, C, 2 + sinks + R + C + A]` bool. It is 1 if all chunks are alike. The last dimension begins
        with two columns that are no keys (see `with_front`) and False. Then come the sinks, and the R + C + A
        keys that each chunk reads.
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
