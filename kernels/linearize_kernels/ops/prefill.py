"""The inputs of the two fast algorithms (forms), made from q, k, v and a state, and the state after a
segment.

The sliding form computes a softmax window with far features, and the group form squared ReLU in groups. Each
is computed by torch or by Triton, from the same inputs (`Tokens` or `Groups`). All that depends on the
layer's parameters (features, key weights, far factor, conv) is computed here, once for both implementations.
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
    """Compute T consecutive tokens of a layer with a sliding softmax window. If the layer is not causal, they
    are a whole row.

    Args:
        state: the state before the tokens.
        count: the number of earlier tokens, the same in every row.
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.
        chunk: tokens in a chunk.
        dtype: the dtype in which q, k, v and features are passed to `run`.
        run: the implementation, `torch_forms.sliding.sliding` or `triton.forms.sliding`.

    Returns:
        The outputs `[B, heads, T, Dv]`, and the running sums S and z of the linear part after the tokens.
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
    sinks = (eq.to_far_heads(x) for x in sinks_with(state, count, k, v, eq.sinks))
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
    """Compute T consecutive tokens of a layer whose local part is squared ReLU within groups of tokens.

    Args:
        state: the state before the tokens.
        count: the number of earlier tokens, the same in every row.
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.
        chunk: tokens in a group.
        dtype: the dtype in which q, k, v and features are passed to `run`.
        run: the implementation, `torch_forms.grouped.grouped` or `triton.forms.grouped`.

    Returns:
        The outputs `[B, heads, T, Dv]`, and the running sums S and z of the linear part after the tokens.
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
    """Return the layer's linear part (linear attention), or None if it has none or an ablation drops it
    (`attention.dropped`).
    """
    return None if attention.dropped == "far" else attention.far


def timeline(
    old: Tensor, new: Tensor, count: int, fill: int = 0, ahead: int = 0, pad: Callable = zero_pad
) -> Tensor:
    """Join along T: `fill` empty places, R recent tokens, T new ones, and `ahead` empty places.

    Args:
        old: `[B, kv, R, X]`, the keys or values of the recent tokens.
        new: `[B, kv, T, X]`, those of the new tokens.
        count: the number of earlier tokens. If there are fewer than R, the places of the missing ones are
            empty too.
        pad: the function that adds empty places before and after a tensor, `zero_pad` or `copy_pad`.

    Returns:
        `[B, kv, fill + R + T + ahead, X]`.
    """
    recent = old.shape[-2]
    there = min(count, recent)
    return pad(torch.cat([old[..., recent - there :, :], new], -2), fill + recent - there, ahead)


def copy_pad(x: Tensor, before: int, after: int = 0) -> Tensor:
    """Pad the T dimension of `x [..., T, X]` with copies of its first token: `before` in front and `after`
    behind.

    It replaces `zero_pad` for vectors that feature maps read, because some maps have no value at zero.
    """
    if not before and not after:
        return x
    first = x[..., :1, :]
    ends = (first.expand(*x.shape[:-2], count, -1) for count in (before, after))
    return torch.cat([next(ends), x, next(ends)], -2)


def join_heads(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Join batch and heads of S, `[B, far, ...]` to `[N, ...]`, and convert to a dtype if one is given.
    None stays None.
    """
    return None if x is None else x.flatten(0, 1).to(dtype or x.dtype)


def repeat_heads(attention: LinearAttention, parameter: Tensor, batch: int) -> Tensor:
    """Repeat a parameter `[heads, ...]` for all rows of a batch, grouped by the heads of S: `[N, g, ...]`.

    N is batch x heads of S, and g the number of query heads of each.
    """
    own = parameter.unflatten(0, (attention.equation.far_heads, -1))
    return own.repeat(batch, *[1] * (own.dim() - 1))


def taps(attention: LinearAttention, batch: int) -> Tensor | None:
    """Return the conv's weights, repeated for all rows, `[N, g, W]`, or None without a conv.

    N is batch x heads of S, and g the number of query heads of each.
    """
    if attention.conv is None:
        return None
    return repeat_heads(attention, attention.conv, batch).to(accumulator(attention.conv.dtype))


def far_factor(attention: LinearAttention, q: Tensor, position: Tensor, length: int) -> Tensor:
    """Compute the logit of the linear part for each query, `[..., far, g, T]`. It is -inf for a query that it
    has no tokens for.

    This is `mix(q)` of `combine.Shared`, or 0 without that parameter.

    Args:
        q: `[..., far, g, T, D]`.
        position: `[T]` or `[..., T]`, the queries' positions.
        length: the number of tokens in a row. It is read only if the equation is not causal.
    """
    eq, mix = attention.equation, attention.combine.mix
    factor = q.new_zeros(q.shape[:-1]) if mix is None else per_head(mix, q)
    nothing = position < eq.sinks + eq.size
    if not eq.causal:
        nothing = nothing & (position > length - 1 - eq.size)
    return factor.masked_fill(nothing, float("-inf"))


def sinks_with(state: State | None, count: int, k: Tensor, v: Tensor, sinks: int) -> list[Tensor]:
    """Return the sinks' keys `[B, kv, sinks, D]` and values `[B, kv, sinks, Dv]` after new tokens.

    Args:
        state: the state before them. None before the first token, if there are at least `sinks` new ones.
        count: the number of earlier tokens, the same in every row.
        k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`. They are sinks if they are among a row's
            first.
        sinks: the number of attention sinks.
    """
    if not sinks:
        return [x.new_empty(*x.shape[:-2], 0, x.shape[-1]) for x in (k, v)]
    if state is None:
        return [x[..., :sinks, :].clone(memory_format=torch.contiguous_format) for x in (k, v)]
    first, second = (min(tokens, sinks) for tokens in (count, count + k.shape[-2]))
    if first == sinks:
        return [state.sink_k, state.sink_v]
    return [
        torch.cat([x[..., :first, :], new[..., : second - first, :], x[..., second:, :]], -2)
        for x, new in ((state.sink_k, k), (state.sink_v, v))
    ]


def after(
    attention: LinearAttention, state: State | None, S: Tensor, z: Tensor, count: int, k: Tensor, v: Tensor
) -> State:
    """Return the state after new tokens, with given S and z. This function updates the sinks, the recent
    tokens and the count.

    Args:
        state: the state before the tokens. None before the first token, if there are at least R new ones.
        S, z: those after the tokens, `[B, far, F, Dv]` and `[B, far, F]`.
        count: the number of earlier tokens, the same in every row.
        k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
    """
    eq, batch, length = attention.equation, len(k), k.shape[-2]
    end, whole = count + length, length >= eq.recent

    def last(old: Tensor | None, new: Tensor) -> Tensor:
        recent = new[..., max(length - eq.recent, 0) :, :]
        if old is None or whole:
            return recent.clone(memory_format=torch.contiguous_format)
        return torch.cat([old[..., length:, :], recent], -2)

    position = torch.arange(end - eq.recent, end, device=S.device)
    sink_k, sink_v = sinks_with(state, count, k, v, eq.sinks)
    return State(
        S,
        z,
        sink_k,
        sink_v,
        recent_k=last(None if state is None else state.recent_k, k),
        recent_v=last(None if state is None else state.recent_v, v),
        recent_position=(position if end >= eq.recent else position.clamp_min(-1)).expand(batch, -1),
        count=torch.full((batch,), length, device=S.device) if state is None else state.count + length,
    )
