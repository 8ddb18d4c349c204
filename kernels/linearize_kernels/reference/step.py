"""`step`: the definition of the equation, for one token of one sequence.

It is slow, simple and independent of `block`. It keeps the token sets of the definition as lists, and folds a
token into S and z when it leaves the window or group.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.parts.combine import Far


@dataclass(frozen=True)
class StepState:
    """The state between two calls of `step`, for one sequence.

    Attributes:
        S: `[far, F, Dv]`, the sum Σ φ(k) vᵀ over the tokens that have left the window or group.
        z: `[far, F]`, the sum Σ φ(k) over them.
        count: the number of tokens so far.
        folded: the number of tokens in S.
        sinks, near: the attention sinks and the tokens in the window or group, as
            `(position, k [kv, D], v [kv, Dv])`, oldest first.
        past_v: the values `[kv, Dv]` of the tokens that the conv reads, newest first.
    """

    S: Tensor
    z: Tensor
    count: int = 0
    folded: int = 0
    sinks: list = field(default_factory=list)
    near: list = field(default_factory=list)
    past_v: list = field(default_factory=list)


def step_state(attention: LinearAttention, dtype: torch.dtype = torch.float64) -> StepState:
    """Return the empty state of `step` (the reference that computes one token) in a dtype."""
    eq = attention.equation
    features, width = (0, eq.value_dim) if attention.far is None else attention.far.state_width
    S = torch.zeros(eq.far_heads, features, width, dtype=dtype)
    return StepState(S, S.sum(-1))


def step(
    attention: LinearAttention,
    state: StepState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, StepState]:
    """Compute one token as the equation defines it. The given state does not change.

    Args:
        state: the state before the token.
        q: `[heads, D]`.
        k, v: `[kv, D]` and `[kv, Dv]`.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.

    Returns:
        The output `[heads, Dv]`, and the state after the token.
    """
    eq, now = attention.equation, state.count
    token = (now, k, v)
    sinks, near = list(state.sinks), list(state.near)
    (sinks if now < eq.sinks else near).append(token)
    S, z, folded, kept = state.S, state.z, state.folded, []
    for position, near_k, near_v in near:
        same_group = eq.size > 0 and position // eq.size == now // eq.size
        if same_group if eq.scope == "group" else now - position < eq.size:
            kept.append((position, near_k, near_v))
        elif attention.far is not None:
            pair = near_k[:, None], near_v[:, None]  # one row
            S, z = S.clone(), z.clone()
            attention.far.fold_one(S[:, None], z[:, None], *pair, [position])
            folded += 1
    past_v = [v, *state.past_v][: eq.conv_width]

    outputs, read = [], None
    if attention.far is not None:
        read, mass = (x.flatten(0, 1) for x in attention.far.read_one(q[:, None], S[:, None], z[:, None]))
    for head in range(eq.heads):
        kv = head // (eq.heads // eq.kv_heads)
        local = sinks + kept
        values, scores = [local_v[kv] for _, _, local_v in local], []
        for position, x, _ in local:
            score = attention.score(q[head, None], x[kv, None], eq.scale, eq.softcap)[0, 0]
            if attention.distance_bias is not None:
                score = score + attention.distance_bias[head, min(now - position, eq.size - 1)].to(q.dtype)
            scores.append(score)
        if sink_logits is not None:
            scores, values = [*scores, sink_logits[head].to(q.dtype)], [*values, torch.zeros_like(v[kv])]
        far = None if read is None else Far(read[head], mass[head, 0], any=folded > 0)
        none = torch.zeros_like(v[kv])
        out = attention.combine.define(head, q[head], scores, values or [none], far)
        if attention.conv is not None:
            for delay, old in enumerate(past_v):
                out = out + attention.conv[head, delay].to(q.dtype) * old[kv]
        outputs.append(out)
    following = replace(state, S=S, z=z, count=now + 1, folded=folded, sinks=sinks, near=kept, past_v=past_v)
    return torch.stack(outputs), following
