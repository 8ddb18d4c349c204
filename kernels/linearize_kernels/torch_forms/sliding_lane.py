"""What the sliding form in blocks reads and makes: the tokens, and their memory as its sums want it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.remembered import remembered
from linearize_kernels.torch_forms.scratch import SCRATCH
from linearize_kernels.torch_forms.tiles import Tiling, flat, windows

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

    S: Tensor
    z: Tensor
    sink_k: Tensor
    sink_v: Tensor


class Lane:
    """Tokens, and memory of `SCRATCH` for all that is made of them. Tokens may be written later, and then be gathered.

    Attributes:
        q: `[N, n, g C, D]`; k: `[N, s, D]`; v: `[N, s, Dv]`; phi_q: `[N, n, g C, F]`; phi_k: `[N, s, F]`; mix:
            `[N, n, g C, 1]`; the last three None: no far part.
        keys, values, phi_keys: of each chunk's columns, phi_keys of the far ones, `[N n, columns, ...]`.
        near, far: `masks`; band: the conv's, `[N, 1, g C, columns]`, given later, or None.
        scores: `[N, n, g C, columns]`, then the weights of the near columns, the first of which is never near: `first`,
            `[N, n, g C]`; far_scores: of the far columns.
        others: `[N, 1 + sinks, n g C]`, the logarithms of the weight of all that is far, `factor [N, n, g C, 1]`, and
            of the sinks', `sinks`; then the weights of the sinks, and what `products` (and what is read of S) are to be
            multiplied by. ceiling, shares: their maximum and sum, `[N, 1, n g C]`.
        products: `[N, n, g C, far columns]`, of features; as tiles, `[N, n, g, C, far columns]`. total: their sum and
            what is read of z, `mass`, both `[N, n, g C, 1]`.
        features: room for as many as phi_q.
        S: outside each chunk's columns and after the last chunk, `[N, n + 1, F, Dv]`.
        old_phi, old_v: of the slots that S takes in, `[N, chunks, C, ...]`.
    """

    def __init__(
        self,
        shape: Shape,
        sinks: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi_q: Tensor | None = None,
        phi_k: Tensor | None = None,
        mix: Tensor | None = None,
    ):
        def room(name: str, *sizes: int) -> Tensor:
            return SCRATCH.take(name, q, *sizes)

        self.band: Tensor | None = None
        self.q, self.k, self.v, self.phi_q, self.phi_k, self.mix = q, k, v, phi_q, phi_k, mix
        self.near, self.far = masks(shape, q)
        lanes, chunks, rows = q.shape[:3]
        self.gathered: list[tuple[Tensor, Tensor]] = []
        self.keys, self.values = (
            self.columns(f"columns of {name}", x, shape) for name, x in (("k", k), ("v", v))
        )
        self.scores = room("scores", lanes, chunks, rows, shape.columns)
        self.first = self.scores[..., 0]
        self.others = room("others", lanes, 1 + sinks, chunks * rows)
        self.factor, self.sinks = self.others[:, 0].unflatten(1, (chunks, rows, 1)), self.others[:, 1:]
        self.ceiling, self.shares = (room(name, lanes, 1, chunks * rows) for name in ("ceiling", "shares"))
        if phi_q is None:
            return
        columns = self.far.shape[-1]
        self.phi_keys = self.columns("columns of phi_k", phi_k, shape, columns)
        self.products = room("products", lanes, chunks, rows, columns)
        self.tiles = self.products.unflatten(2, (-1, shape.chunk))
        self.far_scores = self.scores[..., :columns]
        self.total, self.mass = (room(name, lanes, chunks, rows, 1) for name in ("total", "mass"))
        self.features = room("features", *phi_q.shape)
        old = slice(0, (chunks + shape.around) * shape.chunk)
        self.old_phi, self.old_v = (x[:, old].unflatten(1, (-1, shape.chunk)) for x in (phi_k, v))
        self.S = room("S", lanes, chunks + 1, phi_k.shape[-1], v.shape[-1])

    def columns(self, name: str, x: Tensor, shape: Shape, count: int | None = None) -> Tensor:
        """The slots of every chunk's columns, or of the first ones: `[N, s, X] -> [N n, columns, X]`; a view of one
        lane, to be gathered of more.
        """
        view = windows(x, shape, count)
        if len(x) == 1:
            return flat(view)
        memory = SCRATCH.take(name, x, *view.shape)
        self.gathered.append((memory, view))
        return flat(memory)

    def gather(self) -> None:
        """Once the tokens are written."""
        for memory, view in self.gathered:
            memory.copy_(view)


class Gradients:
    """Room for the gradients of what lies in a lane, laid out as there, and for what is made on the way to them.

    Args:
        out: those of the outputs, `[N, n, g C, Dv]`; take: as of `Scratch`, for those of the tokens.

    Attributes:
        conv, sink_k, sink_v: given later; gradients are added to them.
        near: out · v of all columns; scores, sinks: the gradients of a lane's; mean: out · the output,
            `[N, n, g C, 1]`.
        answers: out · what is read of S, by feature, `[N, n, g C, F]`; S: of what is read.
    """

    def __init__(self, lane: Lane, out: Tensor, take: Callable[..., Tensor]):
        def room(name: str, like: Tensor) -> Tensor:
            return SCRATCH.take(f"d_{name}", lane.q, *like.shape)

        def own(name: str) -> Tensor | None:
            x = getattr(lane, name)
            return None if x is None else take(f"d_{name}", x, *x.shape)

        self.conv: Tensor | None = None
        self.sink_k: Tensor | None = None
        self.sink_v: Tensor | None = None
        self.out = out
        self.q, self.k, self.v, self.phi_q, self.phi_k, self.mix = map(
            own, ("q", "k", "v", "phi_q", "phi_k", "mix")
        )
        self.near, self.scores = room("near", lane.scores), room("scores", lane.scores)
        self.sinks, self.mean = room("sinks", lane.sinks), room("mean", lane.q[..., :1])
        if self.phi_q is not None:
            self.answers, self.S = room("answers", lane.phi_q), room("S", lane.S)


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
