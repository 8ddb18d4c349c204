"""The lanes of a sliding form on a CPU, cut into pieces that its cache holds: which there are, and where they go."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.by_part import Part, parts, sinks_with
from linearize_kernels.torch_forms.scratch import SCRATCH
from linearize_kernels.torch_forms.sliding_lane import Shape
from linearize_kernels.torch_forms.sliding_room import Piece, Room, Size, knows_maps, learned
from linearize_kernels.torch_forms.tiles import at_once


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


class Share(NamedTuple):
    """Some lanes: of the inputs q `[b, h, g, T, D]` and all else `[b, h, ...]`, the sinks as they are after all tokens;
    and what these heads have learned.
    """

    part: Part
    inputs: Inputs
    learned: dict[str, Tensor]

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """S and z before the tokens, by lane."""
        return self.inputs.S.flatten(0, 1), self.inputs.z.flatten(0, 1)


@dataclass
class Run:
    """T tokens after `count` others; the shape is that of all their lanes at once.

    Attributes:
        wanted: as of `Size`.
        rooms: by how many rows, heads and chunks they are for; entered: the one in use, and the share in it.
    """

    attention: LinearAttention
    shape: Shape
    count: int
    length: int
    has_far: bool
    wanted: tuple[str, ...] | None = None
    rooms: dict[tuple[int, int, int], Room] = field(default_factory=dict)
    entered: tuple[Room, Share] | None = None

    def shares(self, inputs: Inputs) -> Iterator[Share]:
        """Some lanes after others."""
        q, k, v, S, z, *kept = inputs
        for part, (*own, own_S, own_z) in parts(self.attention, (S, z), q, k, v, *kept):
            own_q, own_k, own_v, *recent, sink_k, sink_v = own
            sinks = sinks_with(sink_k, sink_v, self.count, own_k, own_v)
            of_heads = self.learned(self.attention, part.heads)
            yield Share(part, Inputs(own_q, own_k, own_v, own_S, own_z, *recent, *sinks), of_heads)

    def learned(self, attention: LinearAttention, heads: slice) -> dict[str, Tensor]:
        """As `sliding_room.learned`, of the attention or of its gradients."""
        return learned(attention, heads, self.has_far, knows_maps(self.attention.far))

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
            position = self.count + before - fill
            found.append(Piece(own, some, 0 if first else fill, tokens, position, self.length))
        return found

    def room(self, share: Share, piece: Piece) -> Room:
        inputs = share.inputs
        place = *inputs.q.shape[:2], piece.chunks
        if place not in self.rooms:
            size = Size(
                self.attention.equation,
                replace(self.shape, start=0, skip=0),
                inputs.S.dtype,
                *place,
                inputs.S.shape[-2],
                self.has_far,
                knows_maps(self.attention.far),
                tuple((name, x.shape) for name, x in share.learned.items()),
                self.wanted,
            )
            self.rooms[place] = SCRATCH.remember(size, inputs.S, lambda: Room(size, inputs.S))
        return self.rooms[place]

    def load(self, share: Share, piece: Piece, S: Tensor, z: Tensor) -> Room:
        """A piece's tokens in a room, with S and z before them. They last until the next is loaded."""
        inputs, room = share.inputs, self.room(share, piece)
        if self.entered is None or self.entered[0] is not room or self.entered[1] is not share:
            room.enter([inputs.sink_k.flatten(0, 1), inputs.sink_v.flatten(0, 1)], share.learned)
            self.entered = room, share
        fill_rows(room.q, inputs.q, piece)
        fill_slots(room.k, inputs.recent_k, inputs.k, piece, self.count)
        fill_slots(room.v, inputs.recent_v, inputs.v, piece, self.count)
        room.beside.S.copy_(S)
        room.beside.z.copy_(z)
        return room

    def leave(self) -> None:
        """Holds no memory any more: a graph keeps what has run forward."""
        self.rooms.clear()
        self.entered = None


def fill_rows(to: Tensor, tokens: Tensor, piece: Piece) -> None:
    """A piece's of all tokens `[b, h, g, T, X]` into its rows `[b, h, g, n C, X]`; zero where there are none."""
    if piece.fill:
        to[..., : piece.fill, :].zero_()
        to = to[..., piece.fill :, :]
    to.copy_(tokens[..., piece.tokens, :])


def fill_slots(to: Tensor, recent: Tensor, tokens: Tensor, piece: Piece, count: int) -> None:
    """A piece's of all tokens `[b, h, T, X]` into its slots `to [b, h, s, X]`; those before the first one are of the
    recent ones, of which there are no more than `count`; zero where there are none.
    """
    first = piece.tokens.start - piece.fill - piece.shape.recent
    before, end = max(0, -first), min(to.shape[-2], tokens.shape[-2] - first)
    if before:
        there = min(before, count, recent.shape[-2])
        to[..., : before - there, :].zero_()
        to[..., before - there : before, :].copy_(recent[..., recent.shape[-2] - there :, :])
    if end < to.shape[-2]:
        to[..., end:, :].zero_()
    if before or end < to.shape[-2]:
        to = to[..., before:end, :]
    to.copy_(tokens[..., first + before : first + end, :])
