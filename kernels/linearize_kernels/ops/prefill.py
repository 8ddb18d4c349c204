"""The chunked forms of a layer: the tokens that they read, made from q, k, v and a state, and the state after them.

A form is computed by torch or by Triton. Both take the same `Tokens` or `Groups`, so all that depends on the layer
(features, weights of keys, far factor, conv) is computed here, once for both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.parts.combine import per_head
from linearize_kernels.parts.far import FeatureMemory
from linearize_kernels.parts.feature_maps import unit_norm
from linearize_kernels.state import State
from linearize_kernels.torch_forms.chunks import Tiling, zero_pad
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.sliding import Shape, Tokens


def sliding_segment(
    attention: LinearAttention,
    state: State,
    count: int,
    heads: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    dtype: torch.dtype,
    run: Callable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute T tokens of the sliding form that follow `count` others in every row; not causal: whole rows.

    Args:
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.
        dtype: of all that the form reads by token.
        run: `torch_forms.sliding.sliding`, or Triton's.

    Returns:
        the outputs `[B, heads, T, Dv]`, and S and z after the tokens.
    """
    q, k, v = heads
    eq, length = attention.equation, k.shape[-2]
    fill = -length % chunk  # empty slots before the first new token
    ahead = 0 if eq.causal else eq.recent + -2 * eq.recent % chunk
    skip = max(fill, eq.sinks + fill + eq.recent - count)
    start = count - fill if eq.causal else eq.sinks  # an encoder's rows see all sinks
    shape = Shape(chunk, eq.recent, eq.size, eq.scale, start, skip, ahead=ahead)

    q = copy_pad(q.contiguous().unflatten(1, (eq.far_heads, -1)), fill)
    keys = eq.to_far_heads(timeline(state.recent_k, k, count, fill, ahead, copy_pad))
    values = eq.to_far_heads(timeline(state.recent_v, v, count, fill, ahead))
    sinks = (eq.to_far_heads(x) for x in sinks_with(state, count, k, v))
    phi_q = phi_k = mix = None
    far = far_read(attention)
    if far is not None:
        wide = accumulator(q.dtype)
        phi_q = far.queries(q.to(wide))
        slot = torch.arange(keys.shape[-2], device=q.device)
        there = (slot >= skip) & (slot < len(slot) - ahead)
        phi_k = far.written(keys.to(wide), there.to(wide) if skip or ahead else None)
        position = torch.arange(count - fill, count + length, device=q.device)
        mix = far_factor(attention, q.to(wide), position, length)
    by_token = (join_heads(x, dtype) for x in (q, keys, values, phi_q, phi_k))
    sums = state.S.flatten(0, 1), state.z.flatten(0, 1)
    before = *sums, *(join_heads(x, dtype) for x in sinks)
    tokens = Tokens._make((*by_token, join_heads(mix), taps(attention, len(q)), *before))
    out, S, z = run(shape, tokens)
    out = out[:, :, fill:].unflatten(0, (len(q), -1)).flatten(1, 2)
    return out, S.view_as(state.S), z.view_as(state.z)


def grouped_segment(
    attention: LinearAttention,
    state: State,
    count: int,
    heads: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    dtype: torch.dtype,
    run: Callable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute T tokens of the group form that follow `count` others in every row. A chunk is a group.

    Arguments and results are those of `sliding_segment`; run: `torch_forms.grouped.grouped`, or Triton's.
    """
    eq, length, wide = attention.equation, heads[0].shape[-2], accumulator(heads[0].dtype)
    q, k, v = (x.to(wide) for x in heads)
    opened, reach = count % chunk, max(eq.conv_width - 1, 0)
    behind = -(count + length) % chunk  # empty slots after the last new token
    first = eq.recent - opened  # the slot where the open group begins

    def groups(x: Tensor, before: int = 0) -> Tensor:  # [B, far, slots, X] -> [B, far, before + n C, X]
        return zero_pad(x[..., max(first - before, 0) :, :], max(before - first, 0), behind)

    q = q.unflatten(1, (eq.far_heads, -1))
    keys, values = (
        eq.to_far_heads(timeline(old.to(wide), new, count))
        for old, new in ((state.recent_k, k), (state.recent_v, v))
    )
    phi_q = phi = phi_k = factor = None
    S, z, folds = state.S, state.z, 0
    far, far_factors = far_read(attention), attention.combine.factor
    if far is not None and far_factors is not None:
        absent = max(0, eq.recent - count)
        phi_q = far.queries(q)
        phi = zero_pad(far.written(keys[..., absent:, :]), absent)
        phi_k, factor = groups(phi), repeat_heads(attention, far_factors, len(q))
        folds = max(0, (length - first) // chunk)
        S = S + phi[..., :first, :].mT @ values[..., :first, :]
        z = z + phi[..., :length, :].sum(-2)
    rows = (None if x is None else zero_pad(x, opened, behind) for x in (unit_norm(q), phi_q))
    unit_q, phi_q = (join_heads(x, dtype) for x in rows)
    unit_k, own_v, phi_k = (
        join_heads(x, dtype) for x in (groups(unit_norm(keys)), groups(values, reach), phi_k)
    )
    conv, first_S = taps(attention, len(q)), S.flatten(0, 1)
    tokens = Groups._make((unit_q, unit_k, own_v, phi_q, phi_k, factor, conv, first_S))
    out, S = run(Tiling(chunk, reach), folds, tokens)
    out = out[:, :, opened : opened + length].unflatten(0, (len(q), -1)).flatten(1, 2)
    if phi is None:
        return out, state.S, state.z
    # The state holds all but the last R tokens: the groups before the open one, and what is left of it.
    done = first + folds * chunk if length >= first else 0
    before = S.view_as(state.S) if done else state.S
    return out, before + phi[..., done:length, :].mT @ values[..., done:length, :], z


def far_read(attention: LinearAttention) -> FeatureMemory | None:
    """Return the far part, or None if there is none or it is dropped."""
    return None if attention.dropped == "far" else attention.far


def timeline(
    old: Tensor, new: Tensor, count: int, fill: int = 0, ahead: int = 0, pad: Callable = zero_pad
) -> Tensor:
    """Put recent tokens `old [B, kv, R, X]` before new ones: `fill + R` slots, the new tokens and `ahead` slots.

    Args:
        count: tokens before the new ones, of which the last R are in `old`.
        pad: makes empty slots.
    """
    recent = old.shape[-2]
    there = min(count, recent)
    return pad(torch.cat([old[..., recent - there :, :], new], -2), fill + recent - there, ahead)


def copy_pad(x: Tensor, before: int, after: int = 0) -> Tensor:
    """Fill empty slots of `x [..., T, X]` with copies of its first token: some feature maps have no value at zero."""
    if not before and not after:
        return x
    first = x[..., :1, :]
    ends = (first.expand(*x.shape[:-2], count, -1) for count in (before, after))
    return torch.cat([next(ends), x, next(ends)], -2)


def join_heads(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Join batch and heads of S, `[B, far, ...] -> [N, ...]`, in a dtype if one is given."""
    return None if x is None else x.flatten(0, 1).to(dtype or x.dtype)


def repeat_heads(attention: LinearAttention, parameter: Tensor, batch: int) -> Tensor:
    """Repeat a parameter `[heads, ...]` for all rows, by the heads of S: `[N, g, ...]`."""
    own = parameter.unflatten(0, (attention.equation.far_heads, -1))
    return own.repeat(batch, *[1] * (own.dim() - 1))


def taps(attention: LinearAttention, batch: int) -> Tensor | None:
    """Return the conv of every head, `[N, g, W]`, or None if there is none."""
    if attention.conv is None:
        return None
    return repeat_heads(attention, attention.conv, batch).to(accumulator(attention.conv.dtype))


def far_factor(attention: LinearAttention, q: Tensor, position: Tensor, length: int) -> Tensor:
    """Compute the logarithm of the far part's factor, -inf for rows that have nothing far.

    Args:
        q: `[..., far, g, T, D]`; position: `[T]`, or `[..., T]`.
        length: tokens in all of a row, which an encoder's rows see.

    Returns:
        `[..., far, g, T]`.
    """
    eq, mix = attention.equation, attention.combine.mix
    factor = q.new_zeros(q.shape[:-1]) if mix is None else per_head(mix, q)
    nothing = position < eq.sinks + eq.size
    if not eq.causal:
        nothing = nothing & (position > length - 1 - eq.size)
    return factor.masked_fill(nothing, float("-inf"))


def sinks_with(state: State, count: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return keys and values of the sinks after the tokens k, v, which follow `count` others in every row."""
    sinks = state.sink_k.shape[-2]
    first, second = (min(tokens, sinks) for tokens in (count, count + k.shape[-2]))
    if first == sinks:
        return [state.sink_k, state.sink_v]
    return [
        torch.cat([x[..., :first, :], new[..., : second - first, :], x[..., second:, :]], -2)
        for x, new in ((state.sink_k, k), (state.sink_v, v))
    ]


def after(state: State, S: Tensor, z: Tensor, count: int, k: Tensor, v: Tensor) -> State:
    """Return the state after the tokens k, v, which follow `count` others in every row; S and z are given."""
    recent, length = state.recent_k.shape[-2], k.shape[-2]

    def last(old: Tensor, new: Tensor) -> Tensor:
        kept = old[..., min(length, recent) :, :]
        return torch.cat([kept, new[..., max(length - recent, 0) :, :]], -2)

    end = count + length
    position = torch.arange(end - recent, end, device=S.device).clamp_min(-1)
    sink_k, sink_v = sinks_with(state, count, k, v)
    return State(
        S,
        z,
        sink_k,
        sink_v,
        recent_k=last(state.recent_k, k),
        recent_v=last(state.recent_v, v),
        recent_position=position.expand_as(state.recent_position),
        count=state.count + length,
    )
