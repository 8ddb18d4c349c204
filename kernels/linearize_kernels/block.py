"""`block`: the equation for a set of new tokens against a state. The one implementation to trust."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.attention import LinearAttention, accumulator
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
            model gives them to its attention (after its positional rotation).
        position: `[..., T]` int64, the token's place in its row: the row's count + its depth; -1 for pads,
            whose outputs mean nothing. Leading dimensions broadcast.
        visible: `[T, T]` or `[..., T, T]` bool, `visible[i, j]`: j is i or an ancestor of i.
        sink_logits: `[heads]`, a learned logit without a value in the softmax (gpt-oss), or None.

    Returns:
        `[..., heads, T, Dv]` in the accumulator's dtype.
    """
    eq = attention.equation
    group, length, batch = eq.heads // eq.kv_heads, q.shape[-2], q.shape[:-3]
    wide = accumulator(q.dtype)
    q = q.to(wide)
    keys = torch.cat([state.sink_k, state.recent_k, k], -2).to(wide)
    values = torch.cat([state.sink_v, state.recent_v, v], -2).to(wide)

    sink_position, recent_position = committed_positions(attention, state)
    key_position = torch.cat([sink_position, recent_position, position], -1)
    seen = (key_position >= 0)[..., None, :] & pad(visible, (key_position.shape[-1] - length, 0), value=True)
    local = seen & (eq.near(position, key_position) | (key_position < eq.sinks)[..., None, :])
    far = seen & ~local
    if attention.dropped == "local":
        local = torch.zeros_like(local)
    local, far = local[..., None, None, :, :], far[..., None, None, :, :]

    def split(x: Tensor, heads: int) -> Tensor:  # [..., heads, T, X] -> [..., heads, group * T, X]
        return x.reshape(*batch, heads, -1, x.shape[-1])

    def per_query_head(x: Tensor) -> Tensor:  # [..., any, any * T, X] -> [..., kv, group, T, X]
        return x.reshape(*batch, eq.kv_heads, group, length, x.shape[-1])

    scores = per_query_head(attention.score(split(q, eq.kv_heads), keys, eq.scale, eq.softcap))
    mass = any_far = None
    if attention.q_map is not None and attention.dropped != "far":
        features = split(attention.q_map(q), eq.far_heads)
        products = per_query_head(features @ attention.key_features(keys).transpose(-1, -2))
        products = products.masked_fill(~far, 0.0)
        mass = products.sum(-1) + per_query_head(features @ state.z[..., None]).squeeze(-1)
        folded = state.count - eq.sinks > (recent_position >= 0).sum(-1)
        any_far = far.any(-1) | folded[..., None, None, None]

    grouped_q = per_query_head(q)
    if sink_logits is None:
        weights, coefficient = attention.combine(grouped_q, scores, local, mass, any_far)
    else:  # one more local key, whose value is zero
        logits = sink_logits.to(wide).view(eq.kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        scores, one_more = torch.cat([scores, logits], -1), pad(local, (0, 1), value=True)
        weights, coefficient = attention.combine(grouped_q, scores, one_more, mass, any_far)
        weights = weights[..., :-1]
    if mass is not None:
        weights = weights + coefficient[..., None] * products
    if attention.conv is not None:
        weights = weights + band(attention.conv.to(wide), position, key_position, seen).view(
            *seen.shape[:-2], eq.kv_heads, group, *seen.shape[-2:]
        )
    out = split(weights.reshape(*batch, eq.heads, length, -1), eq.kv_heads) @ values
    out = out.reshape(*batch, eq.heads, length, eq.value_dim)
    if mass is None:
        return out
    read = (features @ state.S).reshape(out.shape)
    return out + coefficient.reshape(*batch, eq.heads, length, 1) * read


def committed_positions(attention: LinearAttention, state: State) -> tuple[Tensor, Tensor]:
    """Positions `[..., sinks]` of the state's sinks and `[..., R]` of its recent tokens; -1: no such token.
    A sink that is still recent is counted as a sink.
    """
    sinks = torch.arange(attention.equation.sinks, device=state.count.device)
    recent = state.recent_position
    return torch.where(sinks < state.count[..., None], sinks, -1), recent.masked_fill(recent < len(sinks), -1)


def band(conv: Tensor, position: Tensor, key_position: Tensor, seen: Tensor) -> Tensor:
    """The conv as weights: `conv[h, p_i - p_j]` on the visible tokens of its reach. Along any path the τ-th
    ancestor is the visible token τ positions back. `[heads, W] -> [..., heads, T, N]`.
    """
    delay = position[..., :, None] - key_position[..., None, :]
    reach = seen & (delay < conv.shape[-1])
    weights = conv[:, delay.clamp(0, conv.shape[-1] - 1)].movedim(0, -3)
    return weights.masked_fill(~reach[..., None, :, :], 0.0)
