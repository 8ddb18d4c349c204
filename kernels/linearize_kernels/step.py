"""`step`: the equation for one token of one sequence, as it is defined. Slow, plain, and independent of
`block`: it keeps the token sets of the definition as lists and folds a token when it leaves the near part.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from linearize_kernels.attention import LinearAttention


@dataclass(frozen=True)
class StepState:
    """What one token needs of its past. `sinks` and `near` hold `(position, k [kv, D], v [kv, Dv])`, oldest
    first; `past_v` the conv's values, newest first.
    """

    S: Tensor
    z: Tensor
    count: int = 0
    folded: int = 0
    sinks: list = field(default_factory=list)
    near: list = field(default_factory=list)
    past_v: list = field(default_factory=list)


def step_state(attention: LinearAttention, dtype: torch.dtype = torch.float64) -> StepState:
    """The state before the first token."""
    eq = attention.equation
    features = 0 if attention.k_map is None else attention.k_map.feature_dim
    S = torch.zeros(eq.far_heads, features, eq.value_dim, dtype=dtype)
    return StepState(S, S.sum(-1))


def step(
    attention: LinearAttention,
    state: StepState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, StepState]:
    """q `[heads, D]`, k `[kv, D]`, v `[kv, Dv]` -> output `[heads, Dv]` and the next state."""
    eq, now = attention.equation, state.count
    token = (now, k, v)
    sinks, near = list(state.sinks), list(state.near)
    (sinks if now < eq.sinks else near).append(token)
    S, z, folded, kept = state.S, state.z, state.folded, []
    for position, near_k, near_v in near:
        same_group = eq.size > 0 and position // eq.size == now // eq.size
        if same_group if eq.scope == "group" else now - position < eq.size:
            kept.append((position, near_k, near_v))
        elif attention.k_map is not None:
            repeat = eq.far_heads // eq.kv_heads
            phi = attention.k_map(near_k.repeat_interleave(repeat, 0)[:, None])[:, 0]
            S = S + phi[:, :, None] * near_v.repeat_interleave(repeat, 0)[:, None, :]
            z, folded = z + phi, folded + 1
    past_v = [v, *state.past_v][: eq.conv_width]

    phi_q = None if attention.q_map is None else attention.q_map(q[:, None])[:, 0]
    outputs = []
    for head in range(eq.heads):
        kv = head // (eq.heads // eq.kv_heads)
        far = head if eq.per_query_head else kv
        local = sinks + kept
        values = [local_v[kv] for _, _, local_v in local]
        scores = [
            attention.score(q[head, None], x[kv, None], eq.scale, eq.softcap)[0, 0] for _, x, _ in local
        ]
        if sink_logits is not None:
            scores, values = [*scores, sink_logits[head].to(q.dtype)], [*values, torch.zeros_like(v[kv])]
        mass = None if phi_q is None else phi_q[head] @ z[far]
        weights, coefficient = attention.combine.define(head, q[head], scores, mass, folded > 0)
        out = sum((w * x for w, x in zip(weights, values, strict=True)), torch.zeros_like(v[kv]))
        if mass is not None:
            out = out + coefficient * (phi_q[head] @ S[far])
        for delay, old in enumerate(past_v):
            out = out + attention.conv[head, delay].to(q.dtype) * old[kv]
        outputs.append(out)
    following = replace(state, S=S, z=z, count=now + 1, folded=folded, sinks=sinks, near=kept, past_v=past_v)
    return torch.stack(outputs), following
