"""What the sliding form in blocks reads and makes: the tokens, and their memory as its sums want it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.remembered import remembered
from linearize_kernels.scratch import SCRATCH
from linearize_kernels.tiles import Tiling, windows

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


class Beside(NamedTuple):
    """What of `Tokens` does not lie in a lane."""

    conv: Tensor | None
    S: Tensor
    z: Tensor
    sink_k: Tensor
    sink_v: Tensor


class Lane:
    """Tokens, with views of them and memory of `SCRATCH` for what is made of them. What is written into the tokens is
    seen in the views where N is 1.

    Attributes:
        q: `[N, n, g C, D]`; k: `[N, s, D]`; v: `[N, s, Dv]`; phi_q: `[N, n, g C, F]`; phi_k: `[N, s, F]`; mix:
            `[N, n, g C, 1]`; the last three None: no far part.
        keys, values, phi_keys: of each chunk's columns, `[N n, columns, ...]`, phi_keys of the far ones.
        near, far: `masks`.
        scores: `[N, n, g C, columns]`; products: `[N, n, g C, far columns]`.
        band: the conv's, `[N, 1, g C, columns]`, which is given later, or None.
        features: room for as many as phi_q; old_phi, old_v: `[N, chunks, C, ...]`, of the slots that S takes in.
    """

    def __init__(
        self,
        shape: Shape,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi_q: Tensor | None = None,
        phi_k: Tensor | None = None,
        mix: Tensor | None = None,
    ):
        self.band: Tensor | None = None
        self.q, self.k, self.v, self.phi_q, self.phi_k, self.mix = q, k, v, phi_q, phi_k, mix
        self.near, self.far = masks(shape, q)
        self.rows, self.queries = q.flatten(1, 2), flat(q)
        self.keys, self.values = (flat(windows(x, shape)) for x in (k, v))
        self.scores = SCRATCH.take("scores", q, *q.shape[:3], shape.columns)
        self.flat_scores, self.first = flat(self.scores), self.scores[..., :1]
        if phi_q is None:
            return
        lanes, chunks, rows = phi_q.shape[:3]
        columns = self.far.shape[-1]
        self.phi_queries, self.phi_keys = flat(phi_q), flat(windows(phi_k, shape, columns))
        self.products = SCRATCH.take("products", q, lanes, chunks, rows, columns)
        self.flat_products, self.tiles = flat(self.products), self.products.unflatten(2, (-1, shape.chunk))
        self.far_scores = self.scores[..., :columns]
        self.features = SCRATCH.take("features", q, *phi_q.shape)
        old = slice(0, (chunks + shape.around) * shape.chunk)
        self.old_phi, self.old_v = (x[:, old].unflatten(1, (-1, shape.chunk)) for x in (phi_k, v))


def flat(x: Tensor) -> Tensor:
    """`[N, n, I, J] -> [N n, I, J]`, as `bmm` takes it."""
    return x.flatten(0, 1)


def masks(shape: Shape, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows `[N, n, g C, D]`: the band of near columns, `[g C, R + C + A]`, 0 within and LOW outside; and the far
    ones, `[C, R + C + A]`, or without slots ahead the first `R + C - size` of them.
    """
    groups = q.shape[2] // shape.chunk
    return masks_of(shape.chunk, shape.recent, shape.ahead, shape.size, groups, q.dtype, q.device)


@remembered(64)
def masks_of(
    chunk: int,
    recent: int,
    ahead: int,
    size: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    columns = recent + chunk + ahead
    delay = recent + torch.arange(chunk, device=device)[:, None] - torch.arange(columns, device=device)
    if ahead:
        far = delay.abs() >= size
        not_near = far
    else:
        far = delay[:, : columns - size] >= size
        not_near = (delay < 0) | (delay >= size)
    near = torch.zeros(delay.shape, dtype=dtype, device=device).masked_fill_(not_near, LOW)
    return near.repeat(groups, 1), far.to(dtype)
