"""The lanes of a sliding form on a CPU, cut into pieces that its cache holds: what lies in memory for each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from linearize_kernels.attention import LinearAttention
from linearize_kernels.far import Pull
from linearize_kernels.parts import Part, far_factor, nothing_far, parts, sinks_with, taps
from linearize_kernels.scratch import SCRATCH
from linearize_kernels.sliding_lane import Beside, Lane, Shape
from linearize_kernels.tiles import at_once, band, led


class Inputs(NamedTuple):
    """`q [B, heads, T, D]`, k and v `[B, kv, T, D]`, and what a `State` has of the tokens before them."""

    q: Tensor
    k: Tensor
    v: Tensor
    S: Tensor
    z: Tensor
    recent_k: Tensor
    recent_v: Tensor
    sink_k: Tensor
    sink_v: Tensor


class Piece(NamedTuple):
    """Some chunks of a lane. `fill`: so many of their rows come before the first token; `tokens`: of the other rows."""

    shape: Shape
    chunks: int
    fill: int
    tokens: slice

    @property
    def slots(self) -> int:
        return self.shape.recent + self.chunks * self.shape.chunk + self.shape.ahead

    @property
    def first(self) -> int:
        """The token of the first slot; those before the first token are a state's recent ones."""
        return self.tokens.start - self.fill - self.shape.recent


class Made(NamedTuple):
    """What a piece's tokens `q [b, h, g, n C, D]` and `k [b, h, s, D]` were made into, and what pulls the gradients of
    the features back; None: no far part, or not asked for.
    """

    q: Tensor
    k: Tensor
    conv: Tensor | None
    pull_q: Pull | None = None
    pull_k: Pull | None = None


@dataclass
class Run:
    """T tokens after `count` others; the shape is that of all their lanes at once.

    Attributes:
        lanes: by how many chunks they have, those of one lane, which are filled again; bands: of the conv, by the rows
            and the first head of a part.
    """

    attention: LinearAttention
    shape: Shape
    count: int
    length: int
    has_far: bool
    lanes: dict[int, Lane] = field(default_factory=dict)
    bands: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def parts(self, inputs: Inputs) -> Iterator[tuple[Part, Inputs]]:
        """Some lanes after others: q `[b, h, g, T, D]`, all else `[b, h, ...]`, the sinks as they are after all
        tokens.
        """
        q, k, v, S, z, *kept = inputs
        for part, (*own, own_S, own_z) in parts(self.attention, (S, z), q, k, v, *kept):
            own_q, own_k, own_v, *recent, sink_k, sink_v = own
            sinks = (x.to(S.dtype) for x in sinks_with(sink_k, sink_v, self.count, own_k, own_v))
            yield part, Inputs(own_q, own_k, own_v, own_S, own_z, *recent, *sinks)

    def pieces(self, lanes: int) -> list[Piece]:
        """As many chunks as a cache holds, where no row sees what comes after it."""
        shape, eq, fill = self.shape, self.attention.equation, -self.length % self.shape.chunk
        chunks, rows = (self.length + fill) // shape.chunk, eq.heads // eq.far_heads * shape.chunk
        widest = max(shape.columns, self.attention.far.state_width[0] if self.has_far else 0)
        count = chunks if shape.ahead else min(chunks, at_once(lanes * rows * widest))
        found = []
        for first in range(0, chunks, count):
            some, before = min(count, chunks - first), first * shape.chunk
            tokens = slice(max(0, before - fill), before - fill + some * shape.chunk)
            start = shape.start if shape.ahead else shape.start + before
            skip = min(max(0, shape.skip - before), shape.recent + some * shape.chunk)
            own = replace(shape, start=start, skip=skip)
            found.append(Piece(own, some, 0 if first else fill, tokens))
        return found

    def load(
        self, part: Part, own: Inputs, piece: Piece, S: Tensor, z: Tensor, tracked: bool = False
    ) -> tuple[Lane, Beside, Made]:
        """A piece's tokens in a lane, whose S and z before them are given. The lane lasts until the next is loaded.
        `tracked`: with what pulls gradients back through the features.
        """
        b, h, g = own.q.shape[:3]
        shape, lanes = piece.shape, b * h
        lane = self.lanes.get(piece.chunks) if lanes == 1 else None
        names = ("q", "k", "v", "phi_q", "phi_k", "mix")[: 6 if self.has_far else 3]
        if lane is None:
            rows, slots = (lanes, piece.chunks, g * shape.chunk), (lanes, piece.slots)
            sizes = {
                "q": (*rows, own.q.shape[-1]),
                "k": (*slots, own.k.shape[-1]),
                "v": (*slots, own.v.shape[-1]),
                "phi_q": (*rows, S.shape[-2]),
                "phi_k": (*slots, S.shape[-2]),
                "mix": (*rows, 1),
            }
            memory = {name: SCRATCH.take(name, S, *sizes[name]) for name in names}
        else:
            memory = {name: getattr(lane, name) for name in names}
        k = memory["k"].unflatten(0, (b, h))
        q = led(own.q[..., piece.tokens, :].to(S.dtype), piece.fill)
        fill_slots(k, own.recent_k, own.k, piece.first, self.count)
        fill_slots(memory["v"].unflatten(0, (b, h)), own.recent_v, own.v, piece.first, self.count)
        fill_rows(memory["q"], q, shape)
        if g == 1:
            q = memory["q"].view(b, h, g, -1, q.shape[-1])  # whose tokens lie side by side
        made = self.make(part, piece, q, k, memory, tracked)
        if lane is None:
            lane = Lane(shape, own.sink_k.shape[-2], *memory.values())
        if lanes == 1:
            self.lanes[piece.chunks] = lane
        if made.conv is not None:
            place = b, part.heads.start
            if place not in self.bands:
                self.bands[place] = band(made.conv, shape)
            lane.band = self.bands[place]
        return lane, Beside(made.conv, S, z, own.sink_k.flatten(0, 1), own.sink_v.flatten(0, 1)), made

    def make(
        self, part: Part, piece: Piece, q: Tensor, k: Tensor, memory: dict[str, Tensor], tracked: bool
    ) -> Made:
        """Puts the features into the memory."""
        attention, far, heads = self.attention, self.attention.far, part.heads
        b, h, g = q.shape[:3]
        conv = taps(attention, b, heads, q.dtype)
        if not self.has_far:
            return Made(q, k, conv)
        phi_q, phi_k = memory["phi_q"], memory["phi_k"]
        into_q = phi_q.view(b, h, -1, phi_q.shape[-1]) if g == 1 else None
        into_k = phi_k.unflatten(0, (b, h))
        of_q, of_k = (q, heads, piece.fill, into_q), (k, heads, piece.shape.skip, piece.shape.ahead, into_k)
        pull_q = pull_k = None
        if tracked:
            (made_q, pull_q), (made_k, pull_k) = far.queries_vjp(*of_q), far.written_vjp(*of_k)
        else:
            made_q, made_k = far.queries_between(*of_q), far.written_between(*of_k)
        if into_q is None or not made_q.flatten(1, 2).is_set_to(into_q):
            fill_rows(phi_q, made_q, piece.shape)
        if not made_k.is_set_to(into_k):
            phi_k.copy_(made_k.flatten(0, 1))
        first, rows = self.count + piece.tokens.start - piece.fill, piece.chunks * piece.shape.chunk
        nothing = nothing_far(attention.equation, first, rows, self.length, q.device)
        fill_rows(memory["mix"], far_factor(attention, q, heads, nothing)[..., None], piece.shape)
        return Made(q, k, conv, pull_q, pull_k)


def fill_rows(to: Tensor, rows: Tensor, shape: Shape) -> None:
    """`[b, h, g, n C, X]` into `[N, n, g C, X]`."""
    if rows.shape[2] > 1:
        rows = rows.flatten(0, 1).unflatten(2, (-1, shape.chunk)).transpose(1, 2)
    to.view(rows.shape).copy_(rows)


def fill_slots(to: Tensor, recent: Tensor, tokens: Tensor, first: int, count: int) -> None:
    """Tokens `[b, h, T, X]` from `first` on into the slots `to [b, h, s, X]`; those before the first one are of the
    recent ones, of which there are no more than `count`; zero where there are none.
    """
    before, end = max(0, -first), min(to.shape[-2], tokens.shape[-2] - first)
    if before:
        there = min(before, count, recent.shape[-2])
        to[..., : before - there, :] = 0
        to[..., before - there : before, :] = recent[..., recent.shape[-2] - there :, :]
    to[..., before:end, :] = tokens[..., first + before : first + end, :]
    if end < to.shape[-2]:
        to[..., end:, :] = 0
