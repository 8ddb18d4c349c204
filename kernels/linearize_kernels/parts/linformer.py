"""Linformer's far part: softmax over k slots, which tokens are projected on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linearize_kernels.parts.combine import TINY, by_read_head

LOW = -1e30  # a score that no other is below, and whose softmax is finite in a row of nothing else


class Projection(nn.Module):
    """Linformer (arXiv 2006.04768, eq. 7): keys and values are projected on k slots, and softmax runs over these.

    Made causal and of any length, the projection is a running mean: a token at position p counts in slot s with
    weight `E[s, p mod period]`, a softmax over the slots of a learned table: `K_s(i) = Σ_{j∈F(i)} E_sj k_j / Σ E_sj`.
    At the start, token p goes mostly to slot p mod k. S holds `[Σ E k, Σ E v]` and z `Σ E`.
    """

    own_slot = 4.0  # logit of a token's own slot at the start

    def __init__(self, equation):
        super().__init__()
        eq = self.equation = equation
        self.slots = eq.feature_dim or 64
        self.table = nn.Parameter(torch.empty(eq.far_heads, self.slots, 4 * self.slots))
        self.state_width = (self.slots, eq.key_dim + eq.value_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        own = torch.eye(self.slots).repeat(1, self.table.shape[-1] // self.slots)
        self.table.copy_((self.own_slot * own).expand_as(self.table))

    def weights(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up E for tokens at `position [..., N]`: `[..., far, N, slots]`."""
        table = self.table.to(dtype).softmax(1)
        return table[:, :, position % table.shape[-1]].movedim((0, 1), (-3, -1))

    def fold_one(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Sequence[int]) -> None:
        """Write one token of each of B rows into S and z; shapes as of `FeatureMemory.fold_one`."""
        columns = [place % self.table.shape[-1] for place in position]
        share = self.table[:, :, columns].to(k.dtype).softmax(1).mT
        token = self.equation.to_far_heads(torch.cat([k, v], -1))
        S.addcmul_(share[..., None], token[..., None, :])
        z.add_(share)

    def read_one(self, q: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the slots with one query of each of B rows; shapes as of `FeatureMemory.read_one`.

        The numerator is normalised already. The mass is 1, or 0 for a row in which nothing is far.
        """
        eq, total = self.equation, z.flatten(0, 1)[:, None]  # [far * B, 1, slots]
        q, S = by_read_head(q, eq.far_heads), S.flatten(0, 1)
        keys, values = (S / total.mT.clamp_min(TINY)).split([eq.key_dim, eq.value_dim], -1)
        weights = (eq.scale * (q @ keys.mT)).masked_fill(total == 0, LOW).softmax(-1)
        mass = (total > 0).any(-1, keepdim=True).to(q.dtype)
        return mass * (weights @ values), mass.expand(-1, q.shape[1], 1)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        seen: Tensor,
        far: Tensor,
        new: int,
        S: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the slots; arguments and results are those of `far.FeatureMemory.forward`.

        The numerator is normalised already. The mass is 1, or 0 if nothing is far.
        """
        eq, length, far = self.equation, q.shape[-2], far[..., None, None, :, :].to(q.dtype)
        share = self.weights(position, q.dtype)
        shared = share[..., None, :, :]
        q, k, v = eq.fold_queries(q, eq.far_heads), eq.to_far_heads(k), eq.to_far_heads(v)
        old_k, old_v = S.split([eq.key_dim, eq.value_dim], -1)
        total = z[..., None, None, :] + far @ shared  # [..., far, 1, T, slots]
        pairs = far * eq.split_queries(q @ k.transpose(-1, -2), length)
        scores = eq.split_queries(q @ old_k.transpose(-1, -2), length) + pairs @ shared
        scores = (eq.scale * scores / total.clamp_min(TINY)).masked_fill(total == 0, LOW)
        weights = scores.softmax(-1).masked_fill(total == 0, 0.0) / total.clamp_min(TINY)
        own = far * (weights @ shared.transpose(-1, -2))
        out = eq.split_queries(own.flatten(-3, -2) @ v + weights.flatten(-3, -2) @ old_v, length)
        return out, (total > 0).any(-1).to(q.dtype).expand(out.shape[:-1])

    def append(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        share = self.weights(position, k.dtype)
        return S + share.mT @ self.equation.to_far_heads(torch.cat([k, v], -1)), z + share.sum(-2)

    def fold(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        counts = position.movedim(-2, 0)[:, :, None, :, None] >= self.equation.sinks
        share = self.weights(position.movedim(-2, 0), k.dtype).masked_fill(~counts, 0.0)
        tokens = self.equation.to_far_heads(torch.cat([k, v], -1), dim=-4).movedim(-3, 0)
        states = torch.cat([S[None], share.transpose(-1, -2) @ tokens]).cumsum(0)
        return states, torch.cat([z[None], share.sum(-2).expand(-1, *z.shape)]).cumsum(0)
