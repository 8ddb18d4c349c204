"""`block`: the equation for new tokens and a state, the one implementation to trust."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.parts.combine import Far, attend
from linearize_kernels.reference.visibility import Layout, behind
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
    """Compute the outputs of T new tokens: a chain, a tree or a single token. The state is only read.

    Recent and new tokens that are too far behind a query to be near are read by a masked φφ product, older ones through
    S.

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
    layout = behind(attention.equation, state, position, visible)
    return evaluate(attention, state, q, k, v, layout, sink_logits)


def evaluate(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    sink_logits: Tensor | None,
) -> Tensor:
    """Compute the outputs of tokens with a given layout; arguments and result are those of `block`."""
    eq = attention.equation
    length, wide = q.shape[-2], accumulator(q.dtype)
    q = q.to(wide)
    keys = torch.cat([state.sink_k, state.recent_k, k], -2).to(wide)
    values = torch.cat([state.sink_v, state.recent_v, v], -2).to(wide)
    grouped_q = q.unflatten(-3, (eq.kv_heads, -1))

    far = None
    if attention.far is not None and attention.dropped != "far":
        old = keys[..., layout.old, :], values[..., layout.old, :]
        places = layout.old_position, layout.seen, layout.far, layout.new
        out, mass = attention.far(q, *old, *places, state.S, state.z)
        far = Far(
            by_head(eq, out.flatten(-4, -3)),
            mass.flatten(-3, -2).unflatten(-2, (eq.kv_heads, -1)),
            layout.any_far[..., None, None, :],
        )
    local = layout.local[..., None, None, :, :]
    if attention.dropped == "local":
        local = torch.zeros_like(local)

    scores = attention.score(grouped_q.flatten(-3, -2), keys, eq.scale, eq.softcap)
    scores = scores.unflatten(-2, (-1, length))
    if attention.distance_bias is not None:
        scores = scores + by_head(eq, distance_bias(attention.distance_bias, eq.causal, layout.delay))
    local_values = values
    if sink_logits is not None:  # one more local key, whose value is zero
        logits = sink_logits.to(wide).view(eq.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores, local = torch.cat([scores, logits], -1), pad(local, (0, 1), value=True)
        local_values = pad(values, (0, 0, 0, 1))
    out = attention.combine(grouped_q, scores, local, local_values, far)
    if attention.conv is not None:
        taps = by_head(eq, band(attention.conv, layout.tap)).to(wide)
        out = out + attend(taps.expand(*out.shape[:-1], -1), values)
    return out.flatten(-4, -3)


def by_head(eq, x: Tensor) -> Tensor:
    """Group query heads by KV heads: `[..., heads, T, N] -> [..., kv, group, T, N]`."""
    return x.unflatten(-3, (eq.kv_heads, -1))


def distance_bias(table: Tensor, causal: bool, delay: Tensor) -> Tensor:
    """Look up the bias `[..., heads, T, N]` of distances `p_i - p_j [..., T, N]` in a layer's `distance_bias`."""
    zero = 0 if causal else table.shape[-1] // 2
    return table[:, (delay + zero).clamp(0, table.shape[-1] - 1)].movedim(0, -3)


def band(conv: Tensor, tap: Tensor) -> Tensor:
    """Write the conv `[heads, W]` as weights `conv[h, tap]`, 0 for taps beyond it: `[..., heads, T, N]`.

    On any path the τ-th ancestor is the visible token τ positions before.
    """
    return pad(conv, (0, 1)).index_select(1, tap.flatten()).unflatten(1, tap.shape).movedim(0, -3)
