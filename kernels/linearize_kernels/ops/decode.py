"""One decoding step: one new token for every row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import Equation, LinearAttention, accumulator
from linearize_kernels.parts.combine import Far
from linearize_kernels.reference.block import distance_bias
from linearize_kernels.reference.visibility import Layout, laid_out, settled
from linearize_kernels.remembered import derived, remembered
from linearize_kernels.state import State


def decode_one_token(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Compute the output of one token of every row, and the state after it.

    The token that drops out of the recent ones is folded into S first. The query then reads the state alone: sinks and
    recent tokens by their keys, all older ones through S.

    Args:
        state: the state before the token, on a CPU; it is not changed.
        q: `[B, heads, 1, D]`; k: `[B, kv, 1, D]`; v: `[B, kv, 1, Dv]`.
        sink_logits: `[heads]`, as of `block`, or None.

    Returns:
        `[B, heads, 1, Dv]` in the accumulator's dtype, and the next state. Its sinks and recent tokens share memory.
    """
    eq = attention.equation
    counts = tuple(state.count.tolist())
    view, position, count = places_after(eq, counts)
    S, z = fold_oldest(attention, state, counts, k, v)
    sink_k, sink_v = with_new_sink(state, counts, k, v)
    keys = torch.cat([sink_k, state.recent_k[:, :, 1:], k], 2)
    values = torch.cat([sink_v, state.recent_v[:, :, 1:], v], 2)
    recent = slice(eq.sinks, eq.sinks + eq.recent)  # a layer may keep none, not even the new one
    recent_k, recent_v = keys[:, :, recent], values[:, :, recent]
    after = State(S, z, sink_k, sink_v, recent_k, recent_v, position, count)
    return attend(attention, after, *widened(q, keys, values), view, sink_logits), after


def widened(*tensors: Tensor) -> Sequence[Tensor]:
    """Return the tensors, which share a dtype, in the accumulator's."""
    dtype = tensors[0].dtype
    wide = accumulator(dtype)
    return tensors if dtype == wide else [x.to(wide) for x in tensors]


def fold_oldest(
    attention: LinearAttention, state: State, counts: Sequence[int], k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S and z after the tokens that a new token pushes out of the recent ones. Sinks are never folded."""
    eq, S, z = attention.equation, state.S, state.z
    begins = eq.recent + eq.sinks  # tokens of a row before which nothing is folded
    if attention.far is None or max(counts) < begins:
        return S, z
    if eq.recent:  # else the new token itself is folded
        k, v = state.recent_k, state.recent_v
    pair = widened(k[:, :, 0], v[:, :, 0])
    folded = attention.far.fold_one(S, z, *pair, [n - eq.recent for n in counts])
    if min(counts) >= begins:
        return folded
    folds = state.count >= begins
    return tuple(
        torch.where(folds.view(-1, *[1] * (x.dim() - 1)), x, old)
        for x, old in zip(folded, (S, z), strict=True)
    )


def with_new_sink(state: State, counts: Sequence[int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sinks' keys and values, with those of a new token where it is among a row's first."""
    sinks = state.sink_k.shape[2]
    if min(counts) >= sinks:
        return state.sink_k, state.sink_v
    new = (state.count[:, None] == torch.arange(sinks))[:, None, :, None]
    return torch.where(new, k, state.sink_k), torch.where(new, v, state.sink_v)


@dataclass(frozen=True)
class View:
    """What the last token of every row attends to among the N sinks and recent tokens, and what lies in S.

    A lane is a KV head of a row. There is one lane instead of `B * kv` if all rows see the same.

    Attributes:
        local: `[lanes, 1, N]` bool, the tokens in L(i), or None for all of them.
        delay: `[rows, N]`, the distance to each token.
        any_far: `[lanes, 1, 1]` bool, whether F(i) holds a token. A plain bool if it is the same in all rows.
        outside: the layout, where F(i) holds tokens that are not in S yet, or None.
        in_conv: `[lanes, 1, N]` bool, which tokens under the conv exist, or None for all of them.
    """

    local: Tensor | None
    delay: Tensor
    any_far: Tensor | bool
    outside: Layout | None
    in_conv: Tensor | None


@remembered(8)
def places_after(eq: Equation, counts: tuple[int, ...]) -> tuple[View, Tensor, Tensor]:
    """Return the view of one more token of rows, and `recent_position` `[B, R]` and `count` `[B]` after it.

    All layers of a model share them.
    """
    count = torch.tensor(counts) + 1
    position = (count[:, None] - eq.recent + torch.arange(eq.recent)).clamp_min(-1)
    return view_of_last(eq, settled(eq, [n + 1 for n in counts])), position, count


@remembered(512)
def view_of_last(eq: Equation, counts: tuple[int, ...]) -> View:
    """Compute the view of the last token of rows that have `settled` counts, that token counted."""
    layout = laid_out(eq, counts, ())
    local, delay = layout.local[:, 0], layout.delay[:, 0]
    if not eq.recent:  # the new token's own key is there all the same
        local, delay = pad(local, (0, 1)), pad(delay, (0, 1))
    oldest = torch.tensor(counts)[:, None] - eq.recent  # its position: negative if the slot is empty
    in_conv = pad(oldest + torch.arange(eq.recent) >= 0, (eq.sinks, 0), value=True)

    def lanes(x: Tensor) -> Tensor:  # [rows, N] -> [lanes, 1, N]
        return (x.repeat_interleave(eq.kv_heads, 0) if len(counts) > 1 else x)[:, None]

    any_far = layout.any_far
    return View(
        local=None if bool(local.all()) else lanes(local),
        delay=delay,
        any_far=lanes(any_far) if bool(any_far.any() ^ any_far.all()) else bool(any_far.all()),
        outside=None if layout.old.stop <= layout.old.start else layout,
        in_conv=None if bool(in_conv.all()) else lanes(in_conv),
    )


def attend(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    view: View,
    sink_logits: Tensor | None,
) -> Tensor:
    """Compute the outputs `[B, heads, 1, Dv]` of the last token of every row.

    Args:
        q: `[B, heads, 1, D]`.
        keys, values: `[B, kv, N, D]`, those of the sinks and recent tokens.
    """
    eq, batch = attention.equation, len(q)
    groups = eq.heads // eq.kv_heads
    by_head = q[:, :, 0].transpose(0, 1)  # [heads, B, D]
    query = q.reshape(-1, groups, eq.key_dim)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)

    def lanes(x: Tensor) -> Tensor:  # [rows, kv, g, N] -> [B * kv, g, N]
        return x.expand(batch, -1, -1, -1).flatten(0, 1)

    far = taps = None
    if attention.far is not None and attention.dropped != "far" and view.any_far is not False:
        if view.outside is None:
            out, mass = attention.far.read_one(by_head, state.S, state.z)
        else:
            out, mass = read_outside(attention, state, q, keys, values, view.outside)
        far = Far(out.view(-1, groups, eq.value_dim), mass.view(-1, groups, 1), view.any_far)
    local = view.local
    if attention.dropped == "local":
        local = view.delay.new_zeros(1, dtype=torch.bool)
    scores = attention.score(query, keys, eq.scale, eq.softcap)
    if attention.distance_bias is not None:
        bias = distance_bias(attention, view.delay)  # [heads, rows, N]
        scores = scores + lanes(bias.transpose(0, 1).unflatten(1, (-1, groups)))
    if attention.conv is not None:
        taps = derived(attention, "conv", partial(taps_by_token, eq), q.dtype)
        taps = taps if batch == 1 else taps.repeat(batch, 1, 1)
        taps = taps if view.in_conv is None else taps * view.in_conv
    if sink_logits is not None:  # one more local key, whose value is zero
        scores = torch.cat([scores, lanes(sink_logits.to(q.dtype).view(1, -1, groups, 1))], -1)
        values = pad(values, (0, 0, 0, 1))
        local = None if local is None else pad(local.expand(-1, 1, keys.shape[1]), (0, 1), value=True)
        taps = None if taps is None else pad(taps, (0, 1))
    out = attention.combine.one_token(by_head, scores, local, values, far, taps)
    return out.view(batch, eq.heads, 1, eq.value_dim)


def taps_by_token(eq: Equation, conv: Tensor) -> Tensor:
    """Return the conv's weights `[kv, group, N]` of the sinks (0) and recent tokens for the last token."""
    before = eq.sinks + eq.recent - eq.conv_width
    return pad(conv.flip(-1), (before, 0)).unflatten(0, (eq.kv_heads, -1))


def read_outside(
    attention: LinearAttention, state: State, q: Tensor, keys: Tensor, values: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Read S and the recent tokens that are far but not in S yet: in groups, or under a long conv."""
    tokens = (x.unflatten(0, (len(q), -1))[:, :, layout.old] for x in (keys, values))
    places = layout.old_position, layout.seen, layout.far, layout.new
    return attention.far(q, *tokens, *places, state.S, state.z)
