"""Segments of `chunked` in blocks: which equations have such a form, and what it takes and leaves of a state."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.attention import LinearAttention, accumulator
from linearize_kernels.combine import per_head
from linearize_kernels.features import unit_norm
from linearize_kernels.grouped import Groups, grouped
from linearize_kernels.sliding import Shape, Tokens, sliding
from linearize_kernels.state import State
from linearize_kernels.tiles import Tiling

Segment = Callable[[LinearAttention, State, int, Tensor, Tensor, Tensor, int], tuple[Tensor, State]]


def sliding_segment(
    attention: LinearAttention, state: State, count: int, q: Tensor, k: Tensor, v: Tensor, chunk: int
) -> tuple[Tensor, State]:
    """Softmax in a sliding window, positive features, one normaliser."""
    eq, wide, length = attention.equation, accumulator(k.dtype), k.shape[-2]
    fill = -length % chunk
    slots = [
        timeline(old, new, count, fill + eq.recent) for old, new in ((state.recent_k, k), (state.recent_v, v))
    ]
    start, first = count - fill, count - fill - eq.recent  # positions of the first row and the first slot
    skip = max(fill, eq.sinks - first)
    sinks = (state.sink_k, state.sink_v)
    if count < eq.sinks:
        sinks = tuple(x[..., -first : eq.sinks - first, :] for x in slots)
    heads = [eq.to_far_heads(x.to(wide)) for x in (*slots, *sinks)]
    far_k, far_v, sink_k, sink_v = (x.flatten(0, 1) for x in heads)

    def rows(x: Tensor) -> Tensor:  # [B, heads, T, X] -> [B * far, g, n C, X]
        return pad(x, (0, 0, fill, 0)).unflatten(1, (eq.far_heads, -1)).flatten(0, 1)

    q = q.to(wide)
    phi_q = phi_k = mix = None
    if attention.far is not None and attention.dropped != "far":
        phi_q = rows(attention.far.q_map(q))
        phi_k = pad(attention.far.keys(slots[0][..., skip:, :].to(wide)), (0, 0, skip, 0)).flatten(0, 1)
        mix = far_factor(attention, q)[..., None]
        near = min(length, max(0, eq.size + eq.sinks - count))  # so many queries have nothing far
        mix = rows(pad(mix[..., near:, :], (0, 0, near, 0), value=float("-inf"))).squeeze(-1)
    sums = (state.S.flatten(0, 1), state.z.flatten(0, 1))
    tokens = Tokens(rows(q), far_k, far_v, phi_q, phi_k, mix, taps(attention, q), *sums, sink_k, sink_v)
    shape = Shape(chunk, eq.recent, eq.size, eq.scale, start, skip)
    out, S, z = sliding(shape, tokens)
    out = out[:, :, fill:].unflatten(0, (-1, eq.far_heads)).flatten(1, 2)
    return out, after(state, S, z, sinks, slots, count + length)


def far_factor(attention: LinearAttention, q: Tensor) -> Tensor:
    """The logarithm of the far part's factor, `[B, heads, T]`."""
    if attention.combine.mix is None:
        return q.new_zeros(q.shape[:-1])
    kv = attention.equation.kv_heads
    return per_head(attention.combine.mix, q.unflatten(1, (kv, -1))).flatten(1, 2)


def taps(attention: LinearAttention, q: Tensor) -> Tensor | None:
    """The conv of every lane, `[B * far, g, W]`."""
    if attention.conv is None:
        return None
    eq = attention.equation
    return attention.conv.to(q.dtype).view(eq.far_heads, -1, eq.conv_width).repeat(q.shape[0], 1, 1)


def timeline(old: Tensor, new: Tensor, count: int, before: int, behind: int = 0) -> Tensor:
    """`before` slots, the last of which hold as many recent tokens as there are, the new tokens, and `behind` empty
    ones; what is not there is zero.
    """
    recent = old.shape[-2]
    slots, there = pad(new, (0, 0, before, behind)), min(count, recent, before)
    if there:
        slots[..., before - there : before, :] = old[..., recent - there :, :]
    return slots


def after(
    state: State, S: Tensor, z: Tensor, sinks: tuple[Tensor, Tensor], slots: list[Tensor], count: int
) -> State:
    """The state after `count` tokens, the last of which are the last of `slots` (keys and values, R or more)."""
    recent = state.recent_k.shape[-2]
    position = torch.arange(count - recent, count, device=S.device).clamp_min(-1)
    return State(
        S=S.view_as(state.S),
        z=z.view_as(state.z),
        sink_k=sinks[0],
        sink_v=sinks[1],
        recent_k=slots[0][..., slots[0].shape[-2] - recent :, :],
        recent_v=slots[1][..., slots[1].shape[-2] - recent :, :],
        recent_position=position.expand_as(state.recent_position),
        count=torch.full_like(state.count, count),
    )


def grouped_segment(
    attention: LinearAttention, state: State, count: int, q: Tensor, k: Tensor, v: Tensor, chunk: int
) -> tuple[Tensor, State]:
    """Squared ReLU in groups, a sum over all before, no normaliser; the chunks are the groups."""
    eq, wide, length = attention.equation, accumulator(k.dtype), k.shape[-2]
    opened, total, reach = count % eq.size, count + length, max(eq.conv_width - 1, 0)
    behind, first = (
        -total % eq.size,
        eq.recent - opened,
    )  # empty rows after the last; the open group's first slot
    slots = [timeline(old, new, count, eq.recent) for old, new in ((state.recent_k, k), (state.recent_v, v))]
    far_k, far_v = (eq.to_far_heads(x.to(wide)).flatten(0, 1) for x in slots)

    def rows(x: Tensor) -> Tensor:  # [B, heads, T, X] -> [B * far, g, n C, X]
        return pad(x, (0, 0, opened, behind)).unflatten(1, (eq.far_heads, -1)).flatten(0, 1)

    def groups(x: Tensor, before: int = 0) -> Tensor:  # slots -> [N, before + n C, X]
        return pad(x[:, max(first - before, 0) :], (0, 0, max(before - first, 0), behind))

    q = q.to(wide)
    phi_q = phi_k = phi = factor = None
    S, z, folds = state.S.flatten(0, 1), state.z.flatten(0, 1), 0
    if attention.far is not None and attention.dropped != "far":
        absent = max(0, eq.recent - count)
        phi = pad(attention.far.keys(slots[0][..., absent:, :].to(wide)), (0, 0, absent, 0)).flatten(0, 1)
        phi_q, phi_k, z = rows(attention.far.q_map(q)), groups(phi), z + phi[:, :length].sum(1)
        factor = attention.combine.factor.to(wide).view(eq.far_heads, -1).repeat(q.shape[0], 1)
        if count:
            S = S + phi[:, :first].transpose(-1, -2) @ far_v[:, :first]
        folds = max(0, (length - first) // eq.size)
    tokens = Groups(
        *(rows(unit_norm(q)), unit_norm(groups(far_k)), groups(far_v, reach)),
        *(phi_q, phi_k, factor, taps(attention, q), S),
    )
    out, S = grouped(Tiling(eq.size, reach), folds, tokens)
    if phi is not None:  # the state has folded all but the last R tokens, in whole groups or not
        done = first + folds * eq.size if length >= first else 0
        S = S if done else state.S.flatten(0, 1)
        S = S + phi[:, done:length].transpose(-1, -2) @ far_v[:, done:length]
    out = out[:, :, opened : opened + length].unflatten(0, (-1, eq.far_heads)).flatten(1, 2)
    return out, after(state, S, z, (state.sink_k, state.sink_v), slots, total)


FORMS: dict[tuple[str, str, str], Segment] = {
    ("sliding", "softmax", "shared"): sliding_segment,
    ("group", "relu2", "none"): grouped_segment,
}


def segment_of(
    attention: LinearAttention, count: int | None, length: int, has_sink_logits: bool
) -> Segment | None:
    """What evaluates a segment; None: only `block` does.

    Args:
        count: tokens in every row so far, or None: the rows differ.
    """
    eq = attention.equation
    own = eq.softcap is None and attention.distance_bias is None and eq.memory == "none"
    if count is None or has_sink_logits or not own or attention.dropped == "local":
        return None
    if count + length < eq.sinks or eq.sinks > eq.recent or eq.size == 0 or not eq.causal:
        return None
    if eq.feature_map == "linformer" or (eq.scope == "group" and eq.sinks):
        return None
    return FORMS.get((eq.scope, eq.score, eq.combine))
