"""Attention from a decoder to an encoder's tokens: `encode` sums the tokens into S and z, and `cross` reads
them.
"""

from typing import Any

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.parts.combine import TINY


def encode(
    attention: LinearAttention, k: Tensor, v: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the state of an encoder's tokens, `S = Σ φ(k) vᵀ` and `z = Σ φ(k)`.

    Args:
        k, v: `[B, kv, N, D]` and `[B, kv, N, Dv]`.
        valid: `[B, N]` bool, False for pads, or None if there are none.

    Returns:
        S `[B, far, F, Dv]` and z `[B, far, F]`, in fp32, or in fp64 for fp64 inputs.
    """
    empty = attention.empty_state(k.shape[0], k.device, k.dtype)
    if valid is None:
        position = torch.arange(k.shape[-2], device=k.device)[None]
    else:
        position = torch.where(valid, valid.cumsum(-1) - 1, -1)
    k, v = (x.to(accumulator(x.dtype)).unsqueeze(-3) for x in (k, v))
    memory: Any = attention.far  # never None in a cross-attention
    S, z = memory.fold(empty.S, empty.z, k, v, position[:, None])
    return S[-1], z[-1]


def cross(attention: LinearAttention, q: Tensor, S: Tensor, z: Tensor) -> Tensor:
    """Compute `φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)` over an encoder's tokens (arXiv 2406.07368, for
    T5).

    Args:
        q: `[B, heads, T, D]`.
        S: Σ φ(k) vᵀ from `encode`, `[B, far, F, Dv]`.
        z: Σ φ(k) from `encode`, `[B, far, F]`.

    Returns:
        `[B, heads, T, Dv]` in q's dtype.
    """
    eq = attention.equation
    none = q.new_empty(q.shape[0], eq.kv_heads, 0, eq.key_dim + eq.value_dim, dtype=S.dtype)
    k, v = none.split([eq.key_dim, eq.value_dim], -1)
    nothing = torch.zeros(q.shape[-2], 0, dtype=torch.bool, device=q.device)
    position = torch.zeros(0, dtype=torch.long, device=q.device)
    memory: Any = attention.far  # never None in a cross-attention
    far, mass = memory(q.to(S.dtype), k, v, position, nothing, nothing, 0, S, z)
    out = far / mass.clamp_min(TINY)[..., None]
    return out.reshape(*q.shape[:-1], -1).to(q.dtype)
