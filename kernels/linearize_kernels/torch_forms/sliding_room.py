"""Memory for some lanes of a sliding form on a CPU, and what is made there piece after piece: by the same calls each
time, so they are noted once and played from then on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.ops.by_part import far_factor, mix_of, nothing_far, of_queries
from linearize_kernels.parts.combine import pull_per_head
from linearize_kernels.parts.far import FeatureMemory, Pull
from linearize_kernels.parts.feature_maps import Hedgehog
from linearize_kernels.torch_forms.modules import with_tensors
from linearize_kernels.torch_forms.scratch import SCRATCH, keeps
from linearize_kernels.torch_forms.sliding import backward, forward
from linearize_kernels.torch_forms.sliding_lane import Beside, Gradients, Lane, Shape
from linearize_kernels.torch_forms.tape import Tape
from linearize_kernels.torch_forms.tiles import band, flat

R = TypeVar("R")
EVERY = slice(None)
TAPES = 4  # of a room: of its text's first piece, of the others, and of other texts'


class Size(NamedTuple):
    """What a room is for: pieces of so many chunks of `rows` x `heads` lanes.

    Attributes:
        shape: with any start and skip.
        features: F of S.
        learned: the sizes of what `learned` finds.
        wanted: the names of those of it whose gradients are asked for; None: no gradients are.
    """

    equation: Equation
    shape: Shape
    dtype: torch.dtype
    rows: int
    heads: int
    chunks: int
    features: int
    has_far: bool
    has_known_maps: bool
    learned: tuple[tuple[str, torch.Size], ...]
    wanted: tuple[str, ...] | None


class Piece(NamedTuple):
    """Some chunks of a lane.

    Attributes:
        fill: so many of their rows come before the first token; tokens: of the other rows.
        position: of the first row; length: of the whole text.
    """

    shape: Shape
    chunks: int
    fill: int
    tokens: slice
    position: int
    length: int


def knows_maps(far: nn.Module | None) -> bool:
    """Whether all features are Hedgehog's own, as the equation has them: their calls are the same each time."""
    if type(far) is not FeatureMemory or (far.key_weight is None) is far.equation.key_weight:
        return False
    return type(far.q_map) is type(far.k_map) is Hedgehog


def learned(
    attention: LinearAttention, heads: slice, has_far: bool, has_known_maps: bool
) -> dict[str, Tensor]:
    """Parameters, by name, of some heads of S and of the queries that read them; of feature maps only of known ones.
    Or the gradients that are in their places, but for those that are not wanted.
    """
    far, found = attention.far, {}
    if attention.conv is not None:
        found["conv"] = of_queries(attention, attention.conv, heads)
    if has_far and attention.combine.mix is not None:
        found["mix"] = mix_of(attention, heads)
    if has_far and has_known_maps:
        of_maps = {
            "q_map.weight": (far.q_map.weight, far.query_heads(heads)),
            "k_map.weight": (far.k_map.weight, heads),
            "key_weight": (far.key_weight, heads),
        }
        found |= {name: x[own] for name, (x, own) in of_maps.items() if x is not None}
    return found


class Room:
    """Lanes `N = b h` of n chunks: what lies in `lane` by chunk lies here by head, in the same memory where g is 1.

    Attributes:
        q: `[b, h, g, n C, D]`; k, v: `[b, h, s, ...]`; out: `[b, h, g, n C, Dv]`; mix: `[b, h, g, n C, 1]`, phi_q:
            `[b, h, g, n C, F]` and phi_k: `[b, h, s, F]`, or None.
        beside: what does not lie in the lane; learned: as what `learned` finds.
        far: the far part with that as its parameters; None: there is none, or its maps are not known.
        d_q, d_k, d_v, d_phi_q, d_mix, d_out, d_S, d_z, d_learned: gradients, if asked for; those of S and z are of the
            sums after the piece.
    """

    def __init__(self, size: Size, like: Tensor):
        eq, shape, lanes = size.equation, size.shape, size.rows * size.heads
        self.size, self.like = size, like.new_empty(0)
        self.groups = eq.heads // eq.far_heads
        self.tapes: dict[tuple, Tape | None] = {}  # by what their pieces have in common, the last used last
        self.inward: list[tuple[Tensor, Tensor]] = []  # what is by head, and its place in the lane
        self.outward: list[tuple[Tensor, Tensor]] = []
        slots = size.rows, size.heads, shape.recent + size.chunks * shape.chunk + shape.ahead
        self.k, self.v = self.take("k", *slots, eq.key_dim), self.take("v", *slots, eq.value_dim)
        self.learned = {name: self.take(f"learned {name}", *sizes) for name, sizes in size.learned}
        q, out = self.take_rows("q", eq.key_dim), self.take_rows("out", eq.value_dim)
        self.q, self.out = (
            self.by_head("q by head", q, self.inward),
            self.by_head("out by head", out, self.outward),
        )
        phi_q = phi_k = mix = self.far = self.phi_k = None
        if size.has_far:
            phi_q, mix = self.take_rows("phi_q", size.features), self.take_rows("mix", 1)
            self.phi_q = self.by_head("phi_q by head", phi_q, self.inward)
            self.mix = self.by_head("mix by head", mix, self.inward)
            self.phi_k = self.take("phi_k", *slots, size.features)
            phi_k = flat(self.phi_k)
            if size.has_known_maps:
                with torch.device("meta"):
                    self.far = with_tensors(FeatureMemory(eq), self.learned)
        self.lane, self.rows = Lane(shape, eq.sinks, q, flat(self.k), flat(self.v), phi_q, phi_k, mix), out
        sums, sinks = (lanes, size.features), (lanes, eq.sinks)
        self.beside = Beside(
            self.take("S before", *sums, eq.value_dim),
            self.take("z before", *sums),
            self.take("sink_k", *sinks, eq.key_dim),
            self.take("sink_v", *sinks, eq.value_dim),
        )
        if "conv" in self.learned:
            self.lane.band = self.take("band", lanes, 1, self.groups * shape.chunk, shape.columns)
        if size.wanted is not None:
            self.add_gradients()

    def add_gradients(self) -> None:
        size, eq = self.size, self.size.equation
        d_out = self.take_rows("d_out", eq.value_dim)
        d = self.d = Gradients(self.lane, d_out, SCRATCH.take)
        self.d_out = self.by_head("d_out by head", d_out, self.inward)
        self.d_k, self.d_v = d.k.view_as(self.k), d.v.view_as(self.v)
        self.d_q = self.by_head("d_q by head", d.q, self.outward)
        if size.has_far:
            self.d_phi_q = self.by_head("d_phi_q by head", d.phi_q, self.outward)
            self.d_mix = self.by_head("d_mix by head", d.mix, self.outward)
            self.d_phi_k = d.phi_k.view_as(self.phi_k)
        self.d_S, self.d_z, d.sink_k, d.sink_v = (
            self.take(f"d_{name} beside", *x.shape)
            for name, x in zip(Beside._fields, self.beside, strict=True)
        )
        self.d_learned = {
            name: self.take(f"d_learned {name}", *self.learned[name].shape) for name in size.wanted
        }
        if self.lane.band is not None:
            d.conv = self.take("d_conv", len(self.beside.S), self.groups, eq.conv_width)
        self.totals = [d.sink_k, d.sink_v, *self.d_learned.values(), *([] if d.conv is None else [d.conv])]
        self.d_far = None
        if self.far is not None:
            self.d_far = with_tensors(self.far, dict.fromkeys(self.learned) | self.d_learned)

    def take(self, name: str, *sizes: int) -> Tensor:
        return SCRATCH.take(name, self.like, *sizes)

    def take_rows(self, name: str, width: int) -> Tensor:
        """Rows by chunk: `[N, n, g C, X]`."""
        size = self.size
        return self.take(name, size.rows * size.heads, size.chunks, self.groups * size.shape.chunk, width)

    def by_head(self, name: str, rows: Tensor, moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Memory `[b, h, g, n C, X]` of rows by chunk: the same, or what is moved there or from there."""
        size = self.size
        sizes = size.rows, size.heads, self.groups, size.chunks, size.shape.chunk, rows.shape[-1]
        if self.groups == 1:
            return rows.view(sizes).flatten(3, 4)
        found = self.take(name, *sizes)
        moved.append((found, rows.view(*sizes[:2], *sizes[3:1:-1], *sizes[4:]).transpose(2, 3)))
        return found.flatten(3, 4)

    def enter(self, beside: Sequence[Tensor], own: dict[str, Tensor]) -> None:
        """Takes what is the same for all pieces of some lanes: the sinks, and what they have learned."""
        for to, x in zip(self.beside[2:], beside, strict=True):
            to.copy_(x)
        for name, x in own.items():
            self.learned[name].copy_(x)
        if self.lane.band is not None:
            self.lane.band.copy_(band(self.learned["conv"].repeat(self.size.rows, 1, 1), self.size.shape))

    def forward(self, piece: Piece, attention: LinearAttention, heads: slice) -> tuple[Tensor, Tensor]:
        """Makes the outputs, and returns S and z after the piece."""

        def run() -> tuple[Tensor, Tensor]:
            if self.far is not None:
                self.make_features(piece, self.far, EVERY)
            self.fill_lane(piece)
            sums = forward(piece.shape, self.lane, self.beside, self.rows)
            self.move(self.outward, back=True)
            return sums

        if self.phi_k is not None and self.far is None:
            self.make_features(piece, attention.far, heads)
        return self.taped(run, piece)

    def backward(
        self, piece: Piece, attention: LinearAttention, d_attention: LinearAttention, heads: slice
    ) -> tuple[Tensor, Tensor]:
        """Makes the gradients, and returns those of S and z before the piece; adds those of parameters to d_learned and
        those of unknown maps to what `d_attention` has in their places.
        """

        def run() -> tuple[Tensor, Tensor]:
            for total in self.totals:
                total.zero_()
            pulls = () if self.far is None else self.pulled_features(piece, self.far, EVERY)
            self.fill_lane(piece)
            sums = backward(piece.shape, self.lane, self.beside, self.d, self.d_S, self.d_z)
            self.move(self.outward, back=True)
            if "conv" in self.d_learned:
                torch.sum(self.d.conv.unflatten(0, (-1, self.size.heads)), 0, out=self.d_learned["conv"])
            if "mix" in self.learned:
                own = self.q, self.learned["mix"], self.d_q, self.d_learned.get("mix")
                pull_per_head(self.d_mix.squeeze(-1), *own)
            self.pull(pulls, self.d_far)
            return sums

        others = ()
        if self.phi_k is not None and self.far is None:
            others = self.pulled_features(piece, attention.far, heads)
        sums = self.taped(run, piece)
        self.pull(others, d_attention.far)
        return sums

    def make_features(self, piece: Piece, far: FeatureMemory, heads: slice) -> None:
        phi_q = far.queries_between(self.q, heads, piece.fill, self.phi_q)
        shape = piece.shape
        phi_k = far.written_between(self.k, heads, shape.skip, shape.ahead, self.phi_k)
        self.keep_features(phi_q, phi_k)

    def pulled_features(self, piece: Piece, far: FeatureMemory, heads: slice) -> tuple[Pull, Pull]:
        """Makes the features; what pulls gradients back through them."""
        shape = piece.shape
        phi_q, pull_q = far.queries_vjp(self.q, heads, piece.fill, self.phi_q)
        phi_k, pull_k = far.written_vjp(self.k, heads, shape.skip, shape.ahead, self.phi_k)
        self.keep_features(phi_q, phi_k)
        return pull_q, pull_k

    def keep_features(self, phi_q: Tensor, phi_k: Tensor) -> None:
        for to, phi in ((self.phi_q, phi_q), (self.phi_k, phi_k)):
            if not phi.is_set_to(to):
                to.copy_(phi)

    def pull(self, pulls: Sequence[Pull], d_far: FeatureMemory | None) -> None:
        if pulls:
            pulls[0](self.d_phi_q, self.d_q, d_far)
            pulls[1](self.d_phi_k, self.d_k, d_far)

    def fill_lane(self, piece: Piece) -> None:
        """Puts what there is by head, and the far part's factor, where the sums want them."""
        if self.phi_k is not None:
            eq = self.size.equation
            rows = self.q.shape[-2]
            nothing = nothing_far(eq, piece.position, rows, piece.length, self.q.device)
            self.mix.copy_(far_factor(self.learned.get("mix"), self.q, nothing)[..., None])
        self.move(self.inward)
        self.lane.gather()

    def move(self, pairs: list[tuple[Tensor, Tensor]], back: bool = False) -> None:
        for by_head, by_chunk in pairs:
            to, given = (by_head, by_chunk) if back else (by_chunk, by_head)
            to.copy_(given)

    def taped(self, run: Callable[[], R], piece: Piece) -> R:
        """What `run` makes of a piece, by the calls that it made for one like it."""
        with torch.inference_mode():  # autograd counts no versions of what is written in place
            if not keeps(self.like):
                return run()
            eq = self.size.equation
            places = (piece.shape.start, eq.sinks), (piece.position, eq.sinks + eq.size)
            kind = piece.shape.skip, piece.fill, *(min(pair) for pair in places)
            if kind not in self.tapes:
                if len(self.tapes) == TAPES:
                    del self.tapes[next(iter(self.tapes))]
                result, tape = run(), None  # a tape takes longer to make than it saves once
            elif (tape := self.tapes.pop(kind)) is None:
                tape = Tape(run)
                result = tape.result
                if not tape.calls:  # as where torch's functions are not to be seen
                    tape = None
            else:
                result = tape.play()
            self.tapes[kind] = tape
            return result
