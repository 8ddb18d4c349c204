"""`block`: the equation for a set of new tokens against a state. The one implementation to trust."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.attention import LinearAttention, accumulator
from linearize_kernels.combine import Far, attend
from linearize_kernels.state import State


def block(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    visible: Tensor,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Outputs of T new tokens that form a chain, a tree or one token; the state is only read.

    Tokens that a query's own position has pushed out of its near part, whether they are among the state's
    recent ones or in the block, enter as a masked φφ product; older ones through S.

    Args:
        q: `[..., heads, T, D]`; k: `[..., kv, T, D]`; v: `[..., kv, T, Dv]`; keys and queries as the base
            model gives them to its attention (after its positional rotation). Ancestors come before descendants.
        position: `[..., T]` int64, the token's place in its row: the row's count + its depth; -1 for pads,
            whose outputs mean nothing. Leading dimensions broadcast.
        visible: `[T, T]` or `[..., T, T]` bool, `visible[i, j]`: j is i or an ancestor of i.
        sink_logits: `[heads]`, a learned logit without a value in the softmax (gpt-oss), or None.

    Returns:
        `[..., heads, T, Dv]` in the accumulator's dtype.
    """
    sink_position, recent_position = committed_positions(attention, state)
    folded = state.count - attention.equation.sinks > (recent_position >= 0).sum(-1)
    state = replace(state, recent_position=recent_position)
    eq = attention.equation
    far_apart = eq.scope == "group" or q.shape[-2] > eq.size
    tokens = (q, k, v, position, visible)
    return evaluate(attention, state, *tokens, sink_position, folded, far_apart, sink_logits)


def evaluate(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    visible: Tensor,
    sink_position: Tensor,
    folded: Tensor,
    far_apart: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    """As `block`, for any layout of the tokens that are already there.

    Args:
        state: a `recent_position` below 0 marks a token that does not count.
        sink_position: `[..., sinks]`; -1: the sink is not there, or among the new tokens.
        folded: `[...]` bool: whether S holds a token.
        far_apart: whether a new token may be far from another.
    """
    eq = attention.equation
    length, wide = q.shape[-2], accumulator(q.dtype)
    q = q.to(wide)
    keys = torch.cat([state.sink_k, state.recent_k, k], -2).to(wide)
    values = torch.cat([state.sink_v, state.recent_v, v], -2).to(wide)

    key_position = torch.cat([sink_position, state.recent_position, position], -1)
    seen = (key_position >= 0)[..., None, :] & pad(visible, (key_position.shape[-1] - length, 0), value=True)
    local = seen & (eq.near(position, key_position) | (key_position < eq.sinks)[..., None, :])

    far = None
    if attention.far is not None and attention.dropped != "far":
        new = length if far_apart else 0
        old = slice(eq.sinks, keys.shape[-2] - length + new)  # sinks are never far
        far_seen = seen[..., old] & (key_position[..., old] >= eq.sinks)[..., None, :]
        is_far = far_seen & ~local[..., old]
        tokens = (q, keys[..., old, :], values[..., old, :], key_position[..., old], far_seen, is_far)
        out, mass = attention.far(*tokens, new, state.S, state.z)
        far = Far(
            by_head(eq, out.flatten(-4, -3)),
            mass.flatten(-3, -2).unflatten(-2, (eq.kv_heads, -1)),
            (is_far.any(-1) | folded[..., None])[..., None, None, :],
        )
    if attention.dropped == "local":
        local = torch.zeros_like(local)

    scores = attention.score(eq.fold_queries(q, eq.kv_heads), keys, eq.scale, eq.softcap)
    scores = eq.split_queries(scores, length)
    if attention.distance_bias is not None:
        scores = scores + by_head(eq, distance_bias(attention, position, key_position))
    grouped_q = eq.split_queries(eq.fold_queries(q, eq.kv_heads), length)
    local, local_values = local[..., None, None, :, :], values
    if sink_logits is not None:  # one more local key, whose value is zero
        logits = sink_logits.to(wide).view(eq.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores, local = torch.cat([scores, logits], -1), pad(local, (0, 1), value=True)
        local_values = pad(values, (0, 0, 0, 1))
    out = attention.combine(grouped_q, scores, local, local_values, far)
    if attention.conv is not None:
        taps = by_head(eq, band(attention, position, key_position, seen)).to(wide)
        out = out + attend(taps.expand(*out.shape[:-1], -1), values)
    return out.flatten(-4, -3)


def by_head(eq, x: Tensor) -> Tensor:
    """`[..., heads, T, N] -> [..., kv, group, T, N]`."""
    return x.unflatten(-3, (eq.kv_heads, -1))


def committed_positions(attention: LinearAttention, state: State) -> tuple[Tensor, Tensor]:
    """Positions `[..., sinks]` of the state's sinks and `[..., R]` of its recent tokens; -1: no such token.
    A sink that is still recent is counted as a sink.
    """
    sinks = torch.arange(attention.equation.sinks, device=state.count.device)
    recent = state.recent_position
    return torch.where(sinks < state.count[..., None], sinks, -1), recent.masked_fill(recent < len(sinks), -1)


def delays(position: Tensor, key_position: Tensor) -> Tensor:
    """`p_i - p_j`, `[..., T, N]`."""
    return position[..., :, None] - key_position[..., None, :]


def distance_bias(attention: LinearAttention, position: Tensor, key_position: Tensor) -> Tensor:
    """`[..., heads, T, N]`."""
    table = attention.distance_bias
    zero = 0 if attention.equation.causal else table.shape[-1] // 2
    index = (delays(position, key_position) + zero).clamp(0, table.shape[-1] - 1)
    return table[:, index].movedim(0, -3)


def band(attention: LinearAttention, position: Tensor, key_position: Tensor, seen: Tensor) -> Tensor:
    """The conv as weights: `conv[h, p_i - p_j]` on the visible tokens of its reach, or centred,
    `conv[h, p_i - p_j + W div 2]`. Along any path the τ-th ancestor is the visible token τ positions back.
    `[..., heads, T, N]`.
    """
    conv, width = attention.conv, attention.equation.conv_width
    tap = delays(position, key_position) + (0 if attention.equation.causal else width // 2)
    reach = seen & (tap >= 0) & (tap < width)
    weights = conv[:, tap.clamp(0, width - 1)].movedim(0, -3)
    return weights.masked_fill(~reach[..., None, :, :], 0.0)
