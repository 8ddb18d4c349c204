"""Token trees, accepted paths and decoding steps in Triton, without gradients, for CUDA devices.

`tree` computes the outputs of a token tree's nodes. `commit_` appends an accepted path to a state, and
`decode_one_token` appends one token and computes its output. Both write into the state's own tensors.
Positions and counts are read on the device only, so a CUDA graph can replay each of them. Triton is imported
on the first call. `why_not` returns the reason if Triton cannot run.
"""

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.trial import failure
from linearize_kernels.parts.feature_maps import Hedgehog
from linearize_kernels.state import State
from linearize_kernels.triton.tuning import WIDEST, limit

FORMS = (("sliding", "softmax", "shared"), ("group", "relu2", "none"))
MOST_NODES = MOST_SINKS = 64


def why_not(attention: LinearAttention, state: State, q: Tensor) -> str | None:
    """Return the reason why Triton cannot compute these new tokens, or None if it can.

    No kernel supports learned sink logits. The caller must check that there are none.

    Args:
        state: the state before the tokens.
        q: `[B, heads, T, D]`, in the dtype of k and v.
    """
    eq, nodes = attention.equation, q.shape[-2]
    form = (eq.scope, eq.score, eq.combine)
    if form not in FORMS or (eq.scope == "group" and eq.sinks):
        return (
            "there are kernels for a sliding softmax window under one normaliser, and for squared ReLU in groups "
            "without a normaliser and sinks"
        )
    if not eq.causal or eq.memory != "none" or attention.dropped is not None:
        return "the layer must be causal, with a memory that forgets nothing and no part dropped"
    if eq.softcap is not None or attention.distance_bias is not None or eq.feature_map == "linformer":
        return "there are no kernels for a softcap, a bias by distance and Linformer's projection"
    if nodes > min(MOST_NODES, eq.size):
        return f"{nodes} nodes are more than {MOST_NODES} or the {eq.size} tokens of a window or group"
    if eq.sinks > MOST_SINKS:
        return f"{eq.sinks} sinks are more than {MOST_SINKS}"
    if state.S.shape[-2] > WIDEST:
        return f"the features have {state.S.shape[-2]} dimensions, more than {WIDEST}"
    if not all(x.is_contiguous() for x in vars(state).values()):
        return "the state's tensors are not contiguous, and the kernels write into them"
    return limit(q, state.recent_k, state.recent_v)


@torch.no_grad()
def tree(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    visible: Tensor,
) -> Tensor:
    """Compute the outputs of the T nodes of a token tree. The results are those of the reference `block`.

    Args:
        state: the state before the tree. It is only read.
        q, k, v: `[B, heads, T, D]`, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        position: `[B, T]`, -1 for pads.
        visible: `[T, T]` bool, True for a node's ancestors and for itself.

    Returns:
        `[B, heads, T, Dv]` in fp32.

    Raises:
        ValueError: Triton cannot compute these tokens (see `why_not`).
    """
    refuse(attention, state, q)
    from linearize_kernels.triton.node_kernels import attend

    eq, nodes = attention.equation, q.shape[-2]
    phi_k = keys(attention, k) if eq.scope == "group" else None  # a window is longer than any path
    out = torch.empty(*q.shape[:3], v.shape[-1], device=q.device)
    tokens = (k.contiguous(), v.contiguous(), phi_k, position.contiguous(), visible.contiguous())
    with torch.cuda.device_of(q):
        recent = oldest(attention, state, nodes)
        attend(attention, state, q.contiguous(), queries(attention, q), recent, out, tree=tokens)
    return out


@torch.no_grad()
def commit_(
    attention: LinearAttention, state: State, k: Tensor, v: Tensor, valid: Tensor | None = None
) -> None:
    """Append T tokens to a state, in place, such as those accepted by speculative decoding.

    `ops.chunked.commit` computes the same, and returns a new state instead. Keys and values in empty slots
    are undefined afterwards.

    Args:
        state: the state before the tokens, which is written to.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads, which must precede a row's tokens, or None.

    Raises:
        ValueError: Triton cannot compute these tokens (see `why_not`).
    """
    refuse(attention, state, k)
    from linearize_kernels.triton.node_state import fold, join

    left_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    phi_left = keys(attention, state.recent_k[..., : k.shape[-2], :])
    valid = None if valid is None else valid.contiguous()
    with torch.cuda.device_of(k):
        join(attention, state, k.contiguous(), v.contiguous(), valid, phi_left, left_v)
        fold(attention, state, valid, phi_left, left_v)


@torch.no_grad()
def decode_one_token(attention: LinearAttention, state: State, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Append one token of every row to a state, in place, and compute the token's output.

    The token that leaves the window is added to S before S is read, so S is read and written once. Hedgehog's
    features are computed in the kernels, other feature maps in torch.

    Args:
        q, k, v: `[B, heads, 1, D]`, `[B, kv, 1, D]` and `[B, kv, 1, Dv]`.

    Returns:
        `[B, heads, 1, Dv]` in q's dtype.

    Raises:
        ValueError: Triton cannot compute these tokens (see `why_not`).
    """
    refuse(attention, state, q)
    from linearize_kernels.triton.node_kernels import attend
    from linearize_kernels.triton.node_state import join

    eq, far = attention.equation, attention.far
    phi_q: Tensor | None
    phi_left: Tensor | None
    q, left_v, hedgehog = q.contiguous(), torch.empty_like(v, memory_format=torch.contiguous_format), None
    if far is not None and type(far.q_map) is Hedgehog:
        features = (far.q_map.feature_dim,)
        phi_q = q.new_empty(*q.shape[:3], *features, dtype=torch.float32)
        phi_left = q.new_empty(len(q), eq.far_heads, 1, *features, dtype=torch.float32)
        hedgehog = (q, phi_q)
    else:
        phi_q, phi_left = queries(attention, q), keys(attention, state.recent_k[..., :1, :])
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    with torch.cuda.device_of(q):
        join(attention, state, k.contiguous(), v.contiguous(), None, phi_left, left_v, hedgehog)
        recent = oldest(attention, state, 0)  # the new token is now the last recent one
        attend(attention, state, q, phi_q, recent, out, left=(phi_left, left_v))
    return out


def trial(attention: LinearAttention, q: Tensor) -> str | None:
    """Return why the kernels fail on the device of q, or None if they run or `impl` is not "auto" (see `ops.trial`).

    The caller must check with `why_not` that they compute the layer's equation.
    """
    if attention.impl != "auto":
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = attention.empty_state(1, q.device, q.dtype)
        out = decode_one_token(attention, state, q, k, v)
        place = torch.ones(1, 1, dtype=torch.int64, device=q.device)
        tree(attention, state, q, k, v, place, place.bool())
        commit_(attention, state, k, v)
        return out

    return failure(attention, q, "decoding", 1, run)


def refuse(attention: LinearAttention, state: State, q: Tensor) -> None:
    """Raise ValueError if Triton cannot compute these new tokens (see `why_not`)."""
    reason = why_not(attention, state, q)
    if reason is not None:
        raise ValueError(f"Triton's kernels for nodes cannot run: {reason}. Use block and commit.")


def queries(attention: LinearAttention, q: Tensor) -> Tensor | None:
    """Compute the features `[B, far, g, T, F]` of queries `[B, heads, T, D]`, or return None without a linear
    part.
    """
    far: Any = attention.far
    if far is None:
        return None
    return far.queries(q.float().unflatten(1, (attention.equation.far_heads, -1))).contiguous()


def keys(attention: LinearAttention, k: Tensor) -> Tensor | None:
    """Compute the features `[B, far, T, F]` of keys `[B, kv, T, D]`, or return None without a linear part."""
    far: Any = attention.far
    return None if far is None else far.keys(k.float()).contiguous()


def oldest(attention: LinearAttention, state: State, nodes: int) -> Tensor | None:
    """Compute the features of those recent tokens that can be outside a new token's window: the P oldest,
    `[B, far, P, F]`.

    The result is None if there are none, or if the layer has no linear part.

    Args:
        nodes: the number of new tokens, or 0 if the new token is already the last recent one.
    """
    eq = attention.equation
    some = eq.recent if eq.scope == "group" else eq.recent - eq.size + nodes
    return keys(attention, state.recent_k[..., :some, :]) if some else None
