"""`block`: the reference implementation, which computes any equation for new tokens and a state."""

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
    """Compute the outputs of T new tokens: a text, a token tree or a single token. The state is only read.

    Local tokens (sinks, and those in the window or group) are read by their scores. Far tokens (all others)
    are read through S and z if they are in the state. Otherwise they are read one by one, with weights
    φ(q)·φ(k) under a mask.

    Args:
        state: the state before the new tokens.
        q: `[..., heads, T, D]`, queries as the base model's attention gets them (after its positional
            rotation).
        k, v: `[..., kv, T, D]` and `[..., kv, T, Dv]`, in the same way. Ancestors come before descendants.
        position: `[..., T]` int64, each token's position in its row: the row's count plus its depth in the
            tree. It is -1 for pads, whose outputs are arbitrary. Leading dimensions broadcast.
        visible: `[T, T]` or `[..., T, T]` bool, `visible[i, j]` is True if j is i or an ancestor of i.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.

    Returns:
        `[..., heads, T, Dv]` in fp32, or in fp64 for fp64 inputs.
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
    """Compute the outputs `[..., heads, T, Dv]` of T new tokens with given masks. The state is only read.

    Args:
        q, k, v: `[..., heads or kv, T, D]`, as in `block`.
        layout: the masks of which tokens each query sees, and which of them are local or far.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
    """
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
    """Split the heads dimension by KV heads: `[..., heads, T, N] -> [..., kv, group, T, N]`."""
    return x.unflatten(-3, (eq.kv_heads, -1))


def distance_bias(table: Tensor, causal: bool, delay: Tensor) -> Tensor:
    """Look up the learned bias of each pair of tokens, `[..., heads, T, N]`.

    Args:
        table: a layer's `distance_bias`, `[heads, distances]`.
        causal: True if the table begins at distance 0; False if distance 0 is in its middle.
        delay: `[..., T, N]`, the distances p_i - p_j. Those outside of the table take its nearest entry.
    """
    zero = 0 if causal else table.shape[-1] // 2
    return table[:, (delay + zero).clamp(0, table.shape[-1] - 1)].movedim(0, -3)


def band(conv: Tensor, tap: Tensor) -> Tensor:
    """Return the conv's weight of each pair of tokens, `[..., heads, T, N]`.

    Args:
        conv: `[heads, W]`.
        tap: `[..., T, N]`, the index of the weight: how many positions token j is before token i (shifted by
            W // 2 if not causal). It is W for a token that the conv does not read, whose weight is 0.
    """
    return pad(conv, (0, 1)).index_select(1, tap.flatten()).unflatten(1, tap.shape).movedim(0, -3)
