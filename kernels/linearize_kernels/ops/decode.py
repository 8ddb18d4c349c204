"""Decoding of one token of every row at a time, in torch on a CPU."""

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
    """A layer's state, laid out to decode one token after the other on a CPU.

    The recent tokens are in a ring buffer: a new token takes the slot of the oldest one, which is added to S
    and z first. A step writes into all tensors in place, and shares their memory with nothing else. The first
    dimension is heads and the second rows, because feature maps then treat the rows as tokens of a head.

    Attributes:
        equation: the layer's equation.
        dtype: the model's dtype, which `state` returns keys and values in.
        S: `[far, B, F, Dv]`, the running sum Σ φ(k) vᵀ of older tokens.
        z: `[far, B, F]`, the running sum Σ φ(k).
        keys, values: `[kv, B, N, D]` and `[kv, B, N, Dv]`, in the dtype of S. Of the N columns, the sinks
            come first, then the slots of the ring. There is one unused column if the equation keeps no recent
            tokens.
        counts: the number of tokens in each row.
        start: the slot of the oldest token in the ring.
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
        """Return a `State` of the same tokens, which shares no memory with this object."""
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
        """Append one token of every row to the state, in place, and compute the token's output.

        The query reads the state after its own token: sinks and recent tokens by their keys, all older ones
        through S.

        Args:
            attention: the layer's parameters.
            q: `[B, heads, 1, D]`.
            k, v: `[B, kv, 1, D]` and `[B, kv, 1, Dv]`.
            sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.

        Returns:
            `[B, heads, 1, Dv]` in the dtype of S (fp32, or fp64 for fp64 inputs).
        """
        with torch.inference_mode():
            out = self.step(attention, q, k, v, sink_logits)
        return out.clone()  # what inference mode made cannot be used with gradients

    def step(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None
    ) -> Tensor:
        """Append one token of every row to the state, and return the outputs, as `decode_one_token` does.

        It runs in inference mode, which saves a fifth of the time.
        """
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
        """Add the oldest token of each row to the running sums S and z, because a new one pushes it out of
        the ring buffer.

        Sinks are not added, and nothing is added in rows that are too short to lose a token. If the equation
        keeps no recent tokens, the new token itself is added.

        Args:
            k, v: the new tokens, `[kv, B, D]` and `[kv, B, Dv]`.
        """
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
        """Write new tokens over the oldest ones in the ring. A row's first tokens are also written to the
        sink columns.

        Args:
            k, v: the new tokens, `[kv, B, D]` and `[kv, B, Dv]`.
        """
        for stored, new in ((self.keys, k), (self.values, v)):
            if eq.recent:
                stored[:, :, eq.sinks + self.start] = new
            if min(self.counts) < eq.sinks:
                for row, count in enumerate(self.counts):
                    if count < eq.sinks:
                        stored[:, row, count] = new[:, row]
        self.start = (self.start + 1) % max(eq.recent, 1)


def heads_first(x: Tensor) -> Tensor:
    """Return a contiguous copy with the first two dimensions swapped: `[B, heads, ..]` to `[heads, B, ..]`."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class View:
    """Masks of what the last token i of every row attends to among N tokens: the sinks, then the slots of a
    ring buffer.

    Local tokens are sinks and those in the window or group, all others are far. The first dimension M of a
    mask is kv * B, or 1 if all rows see the same.

    Attributes:
        local: `[M, 1, N]` bool, True for the local tokens. None if all N are local.
        delay: `[rows, N]`, the distance p_i - p_j to each token j.
        any_far: `[M, 1, 1]` bool, True if there are far tokens. A plain bool if it is the same in all rows.
        outside: if some far tokens are not in S yet: the layout, and these tokens' columns, oldest first.
            Otherwise None.
        in_conv: `[M, 1, R]` bool, True for slots of the ring that hold a token. None if all do.
    """

    local: Tensor | None
    delay: Tensor
    any_far: Tensor | bool
    outside: tuple[Layout, Tensor] | None
    in_conv: Tensor | None


@remembered(512)
def ring(eq: Equation, start: int) -> tuple[Tensor, Tensor]:
    """Return the order in time of the columns of `Decoding.keys` (the sinks, then the slots of a ring
    buffer).

    Args:
        start: the slot of the oldest token in the ring.

    Returns:
        The indices of the columns from the oldest token to the newest, sinks first, and the inverse
        permutation: each column's place in that order.
    """
    slots = (start + torch.arange(eq.recent)) % max(eq.recent, 1)
    columns = torch.cat([torch.arange(eq.sinks), eq.sinks + slots])
    places = columns if eq.recent else torch.arange(eq.sinks + 1)
    return columns, places.argsort()


@remembered(512)
def view_of_last(eq: Equation, counts: tuple[int, ...], start: int) -> View:
    """Compute the masks of what the last token of every row attends to.

    Args:
        counts: the number of tokens in each row including the last, shortened by `visibility.settled` so that
            equal masks are computed once. One count if all rows have the same.
        start: the slot of the oldest token in the ring buffer.
    """
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
    """Compute the outputs `[B, heads, 1, Dv]` of the last token of every row, which the state holds already.

    Args:
        q: `[heads, B, D]`, the queries of these tokens.
        view: the masks of what they attend to.
        sink_logits: `[heads]`, learned logits without a value in the local softmax, or None.
    """
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
    """Return the conv's weights of the R recent tokens, oldest first and twice in a row: `[kv, group, 2 R]`.

    The recent tokens are in a ring buffer. R entries from the right offset on are the weights of its slots,
    wherever the oldest token is.

    Args:
        conv: `[heads, W]`.
    """
    taps = pad(conv.flip(-1), (eq.recent - eq.conv_width, 0)).unflatten(0, (eq.kv_heads, -1))
    return torch.cat([taps, taps], -1)


def read_state(far: FeatureMemory, state: Decoding, q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the numerator φ(q) S, `[kv * B, group, Dv]`, and its normaliser φ(q) z, `[kv * B, group, 1]`.

    group is the number of query heads of a KV head.

    Args:
        far: the layer's linear part.
        state: the state, which holds S and z.
        q: `[heads, B, D]`, one query of each row.
    """
    eq, read = far.equation, far.read_one(q, state.S, state.z)
    if eq.far_heads == eq.kv_heads:
        return read
    out, mass = (x.view(eq.heads, q.shape[1], -1) for x in read)
    return by_read_head(out, eq.kv_heads), by_read_head(mass, eq.kv_heads)


def read_outside(
    far: FeatureMemory, state: Decoding, q: Tensor, outside: tuple[Layout, Tensor]
) -> tuple[Tensor, Tensor]:
    """Read the far tokens (outside the window or group): those in S and z, and recent ones that are not added
    to S yet.

    There are such recent tokens with scope "group", or with a conv longer than the window.

    Args:
        far: the layer's linear part.
        q: `[heads, B, D]`, one query of each row.
        outside: the layout, and the columns of the recent tokens that may be far.

    Returns:
        The numerator `[kv * B, group, Dv]`, and its normaliser `[kv * B, group, 1]`.
    """
    layout, columns = outside
    tokens = (x.transpose(0, 1)[:, :, columns] for x in (state.keys, state.values))
    places = layout.old_position, layout.seen, layout.far, layout.new
    S, z = (x.transpose(0, 1) for x in (state.S, state.z))
    read = far(q.transpose(0, 1)[:, :, None], *tokens, *places, S, z)  # [B, far, g, 1, ..]
    eq = far.equation
    out, mass = (x.flatten(1, 2).reshape(len(x), eq.heads, -1).transpose(0, 1).contiguous() for x in read)
    return by_read_head(out, eq.kv_heads), by_read_head(mass, eq.kv_heads)
