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


class Share(NamedTuple):
    """Some lanes: of the inputs q `[b, h, g, T, D]` and all else `[b, h, ...]`, the sinks as they are after all tokens;
    and what lies beside a lane, S and z those of the inputs. band: of the conv.
    """

    part: Part
    inputs: Inputs
    beside: Beside
    band: Tensor | None


class Room(NamedTuple):
    """A lane, and its memory by rows and heads: q `[b, h, g, n C, D]` and phi_q `[b, h, n C, F]` (None where g > 1,
    they lie otherwise), k, v and phi_k `[b, h, s, ...]`.
    """

    lane: Lane
    q: Tensor | None
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None


class Made(NamedTuple):
    """The tokens `q [b, h, g, n C, D]` and `k [b, h, s, D]` of a piece, and what pulls the gradients of their features
    back; None: no far part, or not asked for.
    """

    q: Tensor
    k: Tensor
    pull_q: Pull | None = None
    pull_k: Pull | None = None


@dataclass
class Run:
    """T tokens after `count` others; the shape is that of all their lanes at once.

    Attributes:
        rooms: by how many rows, heads and chunks they are for; they are filled again and again.
    """

    attention: LinearAttention
    shape: Shape
    count: int
    length: int
    has_far: bool
    rooms: dict[tuple[int, int, int], Room] = field(default_factory=dict)

    def shares(self, inputs: Inputs) -> Iterator[Share]:
        """Some lanes after others."""
        q, k, v, S, z, *kept = inputs
        for part, (*own, own_S, own_z) in parts(self.attention, (S, z), q, k, v, *kept):
            own_q, own_k, own_v, *recent, sink_k, sink_v = own
            sinks = [x.to(S.dtype) for x in sinks_with(sink_k, sink_v, self.count, own_k, own_v)]
            conv = taps(self.attention, len(own_q), part.heads, S.dtype)
            beside = Beside(conv, *(x.flatten(0, 1) for x in (own_S, own_z, *sinks)))
            own_band = None if conv is None else band(conv, self.shape)
            yield Share(part, Inputs(own_q, own_k, own_v, own_S, own_z, *recent, *sinks), beside, own_band)

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

    def room(self, inputs: Inputs, piece: Piece) -> Room:
        """Where a piece of a share's inputs is put; it lasts until the next is asked for."""
        b, h, g = inputs.q.shape[:3]
        place = b, h, piece.chunks
        if place not in self.rooms:
            rows, slots = (b * h, piece.chunks, g * piece.shape.chunk), (b * h, piece.slots)
            dim, features = inputs.q.shape[-1], inputs.S.shape[-2]
            sizes = {"q": (*rows, dim), "k": (*slots, dim), "v": (*slots, inputs.v.shape[-1])}
            if self.has_far:
                sizes |= {"phi_q": (*rows, features), "phi_k": (*slots, features), "mix": (*rows, 1)}
            memory = {name: SCRATCH.take(name, inputs.S, *size) for name, size in sizes.items()}
            lane = Lane(piece.shape, inputs.sink_k.shape[-2], **memory)
            q, phi_q = (
                x.view(b, h, *middle, -1, x.shape[-1]) if g == 1 and x is not None else None
                for x, middle in ((lane.q, (g,)), (lane.phi_q, ()))
            )
            k, v, phi_k = (
                None if x is None else x.unflatten(0, (b, h)) for x in (lane.k, lane.v, lane.phi_k)
            )
            self.rooms[place] = Room(lane, q, k, v, phi_q, phi_k)
        return self.rooms[place]

    def load(
        self, share: Share, piece: Piece, S: Tensor, z: Tensor, tracked: bool = False
    ) -> tuple[Lane, Beside, Made]:
        """A piece's tokens in a lane, whose S and z before them are given. The lane lasts until the next is loaded.
        `tracked`: with what pulls gradients back through the features.
        """
        inputs, room = share.inputs, self.room(share.inputs, piece)
        q = led(inputs.q[..., piece.tokens, :].to(S.dtype), piece.fill)
        fill_rows(room.lane.q, q, piece.shape)
        fill_slots(room.k, inputs.recent_k, inputs.k, piece.first, self.count)
        fill_slots(room.v, inputs.recent_v, inputs.v, piece.first, self.count)
        made = self.make(share.part, piece, q if room.q is None else room.q, room, tracked)
        room.lane.gather()
        room.lane.band = share.band
        return room.lane, share.beside._replace(S=S, z=z), made

    def make(self, part: Part, piece: Piece, q: Tensor, room: Room, tracked: bool) -> Made:
        """Puts the features into a lane."""
        if not self.has_far:
            return Made(q, room.k)
        attention, lane = self.attention, room.lane
        of_q = q, part.heads, piece.fill, room.phi_q
        of_k = room.k, part.heads, piece.shape.skip, piece.shape.ahead, room.phi_k
        pull_q = pull_k = None
        if tracked:
            (phi_q, pull_q), (phi_k, pull_k) = (
                attention.far.queries_vjp(*of_q),
                attention.far.written_vjp(*of_k),
            )
        else:
            phi_q, phi_k = attention.far.queries_between(*of_q), attention.far.written_between(*of_k)
        if room.phi_q is None or not phi_q.flatten(1, 2).is_set_to(room.phi_q):
            fill_rows(lane.phi_q, phi_q, piece.shape)
        if not phi_k.is_set_to(room.phi_k):
            room.phi_k.copy_(phi_k)
        first, rows = self.count + piece.tokens.start - piece.fill, piece.chunks * piece.shape.chunk
        nothing = nothing_far(attention.equation, first, rows, self.length, q.device)
        fill_rows(lane.mix, far_factor(attention, q, part.heads, nothing)[..., None], piece.shape)
        return Made(q, room.k, pull_q, pull_k)


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
