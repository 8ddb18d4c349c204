"""Decoding one token of every row at a time."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.parts.combine import Far, by_read_head
from linearize_kernels.parts.far import FeatureMemory
from linearize_kernels.reference.block import distance_bias
from linearize_kernels.reference.visibility import Layout, laid_out, settled
from linearize_kernels.remembered import derived, remembered
from linearize_kernels.state import State


class Decoding:
    """A layer's state, laid out for one token after the other on a CPU.

    The recent tokens are a ring buffer: a new token takes the slot of the oldest one, which is folded into S and z
    first. A step writes into all tensors, whose memory nothing else holds. They begin with heads and then rows,
    because feature maps take the rows as tokens of a head.

    Attributes:
        S: `[far, B, F, Dv]`; z: `[far, B, F]`.
        keys: `[kv, B, N, D]`; values: `[kv, B, N, Dv]`: sinks, then the ring's slots, in the accumulator's dtype.
        counts: tokens in each row.
        start: the slot of the oldest token.
    """

    @torch.inference_mode()
    def __init__(self, equation: Equation, state: State):
        eq, wide = equation, state.S.dtype
        self.equation = equation
        self.dtype, self.counts, self.start = state.recent_k.dtype, tuple(state.count.tolist()), 0
        self.S, self.z = (heads_first(x) for x in (state.S, state.z))
        empty = 0 if eq.recent else 1  # where no token is recent, one column that is never seen

        def columns(sinks: Tensor, recent: Tensor) -> Tensor:
            return heads_first(pad(torch.cat([sinks, recent], 2), (0, 0, 0, empty)).to(wide))

        self.keys, self.values = columns(state.sink_k, state.recent_k), columns(state.sink_v, state.recent_v)

    def __deepcopy__(self, memo: dict) -> "Decoding":
        return Decoding(self.equation, self.state())

    def state(self) -> State:
        """Return the state; it shares no memory."""
        eq = self.equation
        columns, _ = ring(eq, self.start)
        kept = [x.transpose(0, 1).index_select(2, columns).to(self.dtype) for x in (self.keys, self.values)]
        (sink_k, recent_k), (sink_v, recent_v) = (x.split([eq.sinks, eq.recent], 2) for x in kept)
        count = torch.tensor(self.counts)
        position = (count[:, None] - eq.recent + torch.arange(eq.recent)).clamp_min(-1)
        S, z = (heads_first(x) for x in (self.S, self.z))  # rows first again
        return State(S, z, sink_k, sink_v, recent_k, recent_v, position, count)

    def decode_one_token(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Compute the output of one token of every row, and take the token in.

        The query reads the state after its own token: sinks and recent tokens by their keys, all older ones through S.

        Args:
            q: `[B, heads, 1, D]`; k: `[B, kv, 1, D]`; v: `[B, kv, 1, Dv]`.
            sink_logits: `[heads]`, as of `block`, or None.

        Returns:
            `[B, heads, 1, Dv]` in the accumulator's dtype.
        """
        with torch.inference_mode():
            out = self.step(attention, q, k, v, sink_logits)
        return out.clone()  # what inference mode made cannot be used with gradients

    def step(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None
    ) -> Tensor:
        """Compute `decode_one_token` in inference mode, where every operation takes a fifth less time."""
        eq = attention.equation
        if q.dtype != self.S.dtype:
            q, k, v = q.to(self.S.dtype), k.to(self.S.dtype), v.to(self.S.dtype)
        q, k, v = q.squeeze(2).transpose(0, 1), k.squeeze(2).transpose(0, 1), v.squeeze(2).transpose(0, 1)
        self.fold_oldest(attention, k, v)
        self.write(eq, k, v)
        self.counts = tuple(n + 1 for n in self.counts)
        view = view_of_last(eq, settled(eq, self.counts), self.start)
        return attend(attention, self, q, view, sink_logits)

    def fold_oldest(self, attention: LinearAttention, k: Tensor, v: Tensor) -> None:
        """Fold the tokens that new ones, k `[kv, B, D]` and v `[kv, B, Dv]`, push out. Sinks are never folded."""
        eq = attention.equation
        begins = eq.recent + eq.sinks  # tokens of a row before which nothing is folded
        if attention.far is None or max(self.counts) < begins:
            return
        if eq.recent:  # else the new token itself is folded
            slot = eq.sinks + self.start
            k, v = self.keys[:, :, slot], self.values[:, :, slot]
        stay = [row for row, count in enumerate(self.counts) if count < begins]
        kept = (self.S[:, stay], self.z[:, stay]) if stay else None
        attention.far.fold_one(self.S, self.z, k, v, [n - eq.recent for n in self.counts])
        if kept:
            self.S[:, stay], self.z[:, stay] = kept

    def write(self, eq: Equation, k: Tensor, v: Tensor) -> None:
        """Write new tokens over the oldest ones, and among the sinks if they are a row's first."""
        for stored, new in ((self.keys, k), (self.values, v)):
            if eq.recent:
                stored[:, :, eq.sinks + self.start] = new
            if min(self.counts) < eq.sinks:
                for row, count in enumerate(self.counts):
                    if count < eq.sinks:
                        stored[:, row, count] = new[:, row]
        self.start = (self.start + 1) % max(eq.recent, 1)


def heads_first(x: Tensor) -> Tensor:
    """Copy `[B, heads, ..]` to `[heads, B, ..]`."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class View:
    """What the last token of every row attends to among the N sinks and slots of the ring.

    Masks begin with `M = kv * B`, or 1 if all rows see the same.

    Attributes:
        local: `[M, 1, N]` bool, the tokens in L(i), or None for all of them.
        delay: `[rows, N]`, the distance to each token.
        any_far: `[M, 1, 1]` bool, whether F(i) holds a token. A plain bool if it is the same in all rows.
        outside: the layout, where F(i) holds tokens that are not in S yet, and their columns, oldest first; or None.
        in_conv: `[M, 1, R]` bool, which slots of the ring hold a token, or None for all of them.
    """

    local: Tensor | None
    delay: Tensor
    any_far: Tensor | bool
    outside: tuple[Layout, Tensor] | None
    in_conv: Tensor | None


@remembered(512)
def ring(eq: Equation, start: int) -> tuple[Tensor, Tensor]:
    """Return the columns of the sinks and recent tokens, oldest first, and the place of each column among these."""
    slots = (start + torch.arange(eq.recent)) % max(eq.recent, 1)
    columns = torch.cat([torch.arange(eq.sinks), eq.sinks + slots])
    places = columns if eq.recent else torch.arange(eq.sinks + 1)
    return columns, places.argsort()


@remembered(512)
def view_of_last(eq: Equation, counts: tuple[int, ...], start: int) -> View:
    """Compute the view of the last token of rows that have `settled` counts, that token counted."""
    layout = laid_out(eq, counts, ())
    columns, order = ring(eq, start)
    local, delay = layout.local[:, 0], layout.delay[:, 0]
    oldest = torch.tensor(counts)[:, None] - eq.recent  # its position: negative if the slot is empty
    in_conv = oldest + (torch.arange(eq.recent) - start) % max(eq.recent, 1) >= 0
    if not eq.recent:
        local, delay = pad(local, (0, 1)), pad(delay, (0, 1))

    def spread(x: Tensor) -> Tensor:  # [rows, N] -> [M, 1, N]
        return (x.repeat(eq.kv_heads, 1) if len(counts) > 1 else x)[:, None]

    any_far = layout.any_far
    return View(
        local=None if bool(local.all()) else spread(local[:, order]),
        delay=delay[:, order],
        any_far=spread(any_far) if bool(any_far.any() ^ any_far.all()) else bool(any_far.all()),
        outside=None if layout.old.stop <= layout.old.start else (layout, columns[layout.old]),
        in_conv=None if bool(in_conv.all()) else spread(in_conv),
    )


def attend(
    attention: LinearAttention, state: Decoding, q: Tensor, view: View, sink_logits: Tensor | None
) -> Tensor:
    """Compute the outputs `[B, heads, 1, Dv]` of the last token of every row; q `[heads, B, D]`."""
    eq, batch = attention.equation, q.shape[1]
    kv, groups = eq.kv_heads, eq.heads // eq.kv_heads
    keys, values = state.keys.flatten(0, 1), state.values.flatten(0, 1)

    def spread(x: Tensor) -> Tensor:  # [kv, g, rows, N] -> [kv * B, g, N]
        return x.expand(-1, -1, batch, -1).transpose(1, 2).flatten(0, 1)

    far = taps = None
    if attention.far is not None and attention.dropped != "far" and view.any_far is not False:
        if view.outside is None:
            read = read_state(attention.far, state, q)
        else:
            read = read_outside(attention.far, state, q, view.outside)
        far = Far(*read, view.any_far)
    local = view.local
    if attention.dropped == "local":
        local = torch.zeros(1, 1, keys.shape[1], dtype=torch.bool)
    scores = attention.score(by_read_head(q, kv), keys, eq.scale, eq.softcap)
    if attention.distance_bias is not None:
        bias = distance_bias(attention.distance_bias, eq.causal, view.delay)
        scores = scores + spread(bias.movedim(-3, 0).unflatten(0, (kv, -1)))
    if attention.conv is not None:
        twice = derived(attention, "conv", partial(taps_by_age, eq), q.dtype)
        taps = twice[..., eq.recent - state.start : 2 * eq.recent - state.start]
        taps = taps if batch == 1 else taps.repeat_interleave(batch, 0)
        taps = taps if view.in_conv is None else taps * view.in_conv
    if sink_logits is not None:  # one more local key, whose value is zero
        scores = torch.cat([spread(sink_logits.to(q.dtype).view(kv, groups, 1, 1)), scores], -1)
        values = pad(values, (0, 0, 1, 0))
        local = None if local is None else pad(local, (1, 0), value=True)
    out = attention.combine.one_token(q, scores, local, values, far, taps)
    if batch > 1:
        out = out.unflatten(0, (kv, batch)).transpose(0, 1).contiguous()
    return out.view(batch, eq.heads, 1, eq.value_dim)


def taps_by_age(eq: Equation, conv: Tensor) -> Tensor:
    """Return the conv's weights of the recent tokens, oldest first, twice over: `[kv, group, 2 R]`.

    R of them from one place on are those of the ring's slots.
    """
    taps = pad(conv.flip(-1), (eq.recent - eq.conv_width, 0)).unflatten(0, (eq.kv_heads, -1))
    return torch.cat([taps, taps], -1)


def read_state(far: FeatureMemory, state: Decoding, q: Tensor) -> tuple[Tensor, Tensor]:
    """Read S: numerator `[kv * B, group, Dv]` and mass `[kv * B, group, 1]`."""
    eq, read = far.equation, far.read_one(q, state.S, state.z)
    if eq.far_heads == eq.kv_heads:
        return read
    out, mass = (x.view(eq.heads, q.shape[1], -1) for x in read)
    return by_read_head(out, eq.kv_heads), by_read_head(mass, eq.kv_heads)


def read_outside(
    far: FeatureMemory, state: Decoding, q: Tensor, outside: tuple[Layout, Tensor]
) -> tuple[Tensor, Tensor]:
    """Read S and the recent tokens that are far but not in S yet: in groups, or under a long conv."""
    layout, columns = outside
    tokens = (x.transpose(0, 1)[:, :, columns] for x in (state.keys, state.values))
    places = layout.old_position, layout.seen, layout.far, layout.new
    S, z = (x.transpose(0, 1) for x in (state.S, state.z))
    read = far(q.transpose(0, 1)[:, :, None], *tokens, *places, S, z)  # [B, far, g, 1, ..]
    eq = far.equation
    out, mass = (x.flatten(1, 2).reshape(len(x), eq.heads, -1).transpose(0, 1).contiguous() for x in read)
    return by_read_head(out, eq.kv_heads), by_read_head(mass, eq.kv_heads)
