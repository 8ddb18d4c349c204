"""Fused prefill in Triton: whole texts without gradients, from q, k and v as they are.

Everything between q, k, v and the outputs is computed by kernels: features, key weights, the linear part's logit, unit
norms and masks. `ops.prefill` prepares these in torch, for gradients and for all other equations.
"""

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.prefill import far_read, sinks_with
from linearize_kernels.parts.far import FeatureMemory
from linearize_kernels.parts.feature_maps import Elu, FeatureMap, Hedgehog, Identity, Relu
from linearize_kernels.state import State
from linearize_kernels.torch_forms.chunks import zero_pad
from linearize_kernels.triton.fused_inputs import TILE, Features, Heads, Place, Window

MAPS: dict[type[FeatureMap], str] = {Hedgehog: "hedgehog", Identity: "identity", Elu: "elu", Relu: "relu"}
SEGMENT = 1024  # slots of a segment
MOST_DIMENSIONS = 128  # of heads and features: larger tiles do not fit into registers


def can_fuse(attention: LinearAttention, q: Tensor) -> bool:
    """Return True if the fused kernels can compute the attention of q `[..., T, D]`. `backend.form_of` must
    already have found a fast form.

    They have no backward. On a GPU they need 16-bit dtypes, because products of fp32 need more registers.
    """
    eq, far = attention.equation, far_read(attention)
    if torch.is_grad_enabled() or not eq.causal or type(far) is not FeatureMemory:
        return False
    if type(far.q_map) not in MAPS or type(far.writing_map) is not type(far.q_map):
        return False
    narrow = not q.is_cuda or q.element_size() == 2
    return narrow and max(eq.key_dim, *far.state_width) <= MOST_DIMENSIONS


def sliding(
    attention: LinearAttention,
    state: State | None,
    count: int,
    heads: tuple[Tensor, Tensor, Tensor],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute T consecutive tokens of a layer with a sliding softmax window.

    Args:
        state: the state before the tokens, or None before the first token.
        count: the number of earlier tokens, the same in every row.
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.
        chunk: tokens in a chunk. The kernels work on at most `TILE` together.

    Returns:
        The outputs `[B, heads, T, Dv]`, and the running sums S and z of the linear part after the tokens.
    """
    from linearize_kernels.triton.fused import given_features
    from linearize_kernels.triton.fused_sliding import forward

    eq, length = attention.equation, heads[0].shape[-2]
    skip = max(0, eq.recent + eq.sinks - count)
    place = Place(min(chunk, TILE), eq.recent, skip, lead=eq.recent, rows=length, cut=length, segment=SEGMENT)
    inputs, (name, weights, key_weight) = kernel_inputs(state, count, heads), parameters(attention)
    sink_k, sink_v = (x[..., : eq.sinks, :] for x in (inputs.k, inputs.v))
    if state is not None:
        sink_k, sink_v = (x.contiguous() for x in sinks_with(state, count, inputs.k, inputs.v, eq.sinks))
    window = Window(eq.size, eq.scale, count, attention.combine.mix, sink_k, sink_v)
    with torch.cuda.device_of(inputs.k):
        phi, logits = given_features(inputs, name, weights, key_weight, eq.far_heads, place, window)
        assert logits is not None
        return forward(inputs, phi, logits, eq.far_heads, place, window, attention.conv)


def grouped(
    attention: LinearAttention,
    state: State | None,
    count: int,
    heads: tuple[Tensor, Tensor, Tensor],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute T consecutive tokens of a layer whose local part is squared ReLU within groups of tokens.

    Args:
        state: the state before the tokens, or None before the first token.
        count: the number of earlier tokens, the same in every row.
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.
        chunk: tokens in a group.

    Returns:
        The outputs `[B, heads, T, Dv]`, and the running sums S and z of the linear part after the tokens.
    """
    from linearize_kernels.triton.fused import given_features
    from linearize_kernels.triton.fused_grouped import forward

    eq, length = attention.equation, heads[0].shape[-2]
    opened, before = count % chunk, min(count, eq.recent)
    lead = opened + max(0, -(-(before - opened) // chunk)) * chunk
    end = lead + length
    place = Place(
        chunk, eq.recent, lead - before, lead, rows=end, cut=max(0, end - eq.recent), segment=SEGMENT
    )
    inputs, (name, weights, key_weight) = kernel_inputs(state, count, heads), parameters(attention)
    phi = Features(name, None, None, key_weight)
    factor = attention.combine.factor
    assert factor is not None
    with torch.cuda.device_of(heads[0]):
        if name == "hedgehog":
            phi, _ = given_features(inputs, name, weights, key_weight, eq.far_heads, place)
        return forward(inputs, phi, eq.far_heads, place, factor, attention.conv)


def kernel_inputs(state: State | None, count: int, heads: tuple[Tensor, Tensor, Tensor]) -> Heads:
    """Return q, k, v and the state for the kernels. Only tensors whose last dimension is not contiguous are copied.

    A state may hold anything in its slots of missing recent tokens. The kernels' conv reads them, so they are
    set to zero.

    Args:
        count: the number of earlier tokens.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in heads)
    if state is None:
        return Heads(q, k, v, None, None, None, None)
    missing = max(0, state.recent_k.shape[-2] - count)
    recent_k, recent_v = (zero_pad(x[..., missing:, :], missing) for x in (state.recent_k, state.recent_v))
    return Heads(q, k, v, *(x.contiguous() for x in (recent_k, recent_v, state.S, state.z)))


def parameters(attention: LinearAttention) -> tuple[str, tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Return the name of the feature map, Hedgehog's weights of queries and of keys (or None twice), and the key
    weights or None.
    """
    far = far_read(attention)
    assert far is not None
    q_weight, k_weight = (x.weight if isinstance(x, Hedgehog) else None for x in (far.q_map, far.writing_map))
    return MAPS[type(far.q_map)], (q_weight, k_weight), far.key_weight
