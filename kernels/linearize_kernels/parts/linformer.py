"""Linformer's linear part: softmax over k slots, onto which the tokens' keys and values are projected."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linearize_kernels.parts.combine import TINY, by_read_head

LOW = -1e30  # a score that no other is below, and whose softmax is finite in a row of nothing else


class Projection(nn.Module):
    """Linformer (arXiv 2006.04768, eq. 7): keys and values are projected onto k slots, and softmax runs over
    the slots.

    Here the projection is causal and works for any length: a slot holds a weighted mean of the far tokens so
    far. The token at position p has weight `E[s, p mod period]` in slot s, so the slot's key for query i is
    `K_s(i) = Σ_{j∈F(i)} E_sj k_j / Σ_{j∈F(i)} E_sj`, and its value the same mean of v. E is the softmax over
    the slots of a learned table. At the start, token p goes mostly to slot p mod k. S holds `[Σ E k, Σ E v]`,
    and z holds `Σ E`.

    Attributes:
        slots: k.
        table: `[far, slots, period]`, the logits of E, with a period of 4 k.
        state_width: slots and D + Dv, the last two dimensions of S.
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
        """Look up the weights E `[..., far, N, slots]` of tokens at `position [..., N]`, in a dtype."""
        table = self.table.to(dtype).softmax(1)
        return table[:, :, position % table.shape[-1]].movedim((0, 1), (-3, -1))

    def fold_one(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Sequence[int]) -> None:
        """Add one token of each of B rows to the sums S and z, in place.

        Args:
            S: `[far, B, slots, D + Dv]`.
            z: `[far, B, slots]`.
            k, v: `[kv, B, D]` and `[kv, B, Dv]`.
            position: the token's position in each of the B rows.
        """
        columns = [place % self.table.shape[-1] for place in position]
        share = self.table[:, :, columns].to(k.dtype).softmax(1).mT
        token = self.equation.to_far_heads(torch.cat([k, v], -1))
        S.addcmul_(share[..., None], token[..., None, :])
        z.add_(share)

    def read_one(self, q: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the slots (the projected keys and values) with one query of each of B rows.

        Args:
            q: `[heads, B, D]`.
            S: `[far, B, slots, D + Dv]`.
            z: `[far, B, slots]`.

        Returns:
            The softmax output `[far * B, heads / far, Dv]`, and the normaliser that the combine divides it
            by, `[far * B, heads / far, 1]`, which is 1. Both are 0 for a row whose slots hold no token.
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
        """Attend to the slots (the projected keys and values) with T queries.

        The slots hold the tokens that are summed in S and z, and those of N given tokens that are far
        (outside the window).

        Args:
            q: `[..., heads, T, D]`.
            k, v: `[..., kv, N, D]` and `[..., kv, N, Dv]`, tokens that are not in S yet.
            position: `[..., N]`.
            seen, new: not used (see `far.FeatureMemory.forward`).
            far: `[..., T, N]` bool, True for the far tokens of each query.
            S: `[..., far, slots, D + Dv]`.
            z: `[..., far, slots]`.

        Returns:
            The softmax output `[..., far, heads / far, T, Dv]`, and the normaliser that the combine divides
            it by, `[..., far, heads / far, T]`, which is 1. Both are 0 for a query whose slots hold no token.
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
        """Add N tokens that follow one another to the sums S and z, and return the new S and z.

        Args:
            S: `[B, far, slots, D + Dv]`.
            z: `[B, far, slots]`.
            k, v: `[B, kv, N, D]` and `[B, kv, N, Dv]`. None of the tokens is a sink.
            position: `[B or 1, N]`.
        """
        share = self.weights(position, k.dtype)
        return S + share.mT @ self.equation.to_far_heads(torch.cat([k, v], -1)), z + share.sum(-2)

    def fold(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the running sums S and z before each of n chunks of tokens and after the last:
        `[n + 1, B, far, slots, ...]`.

        Args:
            S: `[B, far, slots, D + Dv]`, before the first chunk.
            z: `[B, far, slots]`.
            k, v: `[B, kv, n, C, D]` and `[B, kv, n, C, Dv]`.
            position: `[B or 1, n, C]`. Tokens whose position is -1 or that of a sink are not added.
        """
        counts = position.movedim(-2, 0)[:, :, None, :, None] >= self.equation.sinks
        share = self.weights(position.movedim(-2, 0), k.dtype).masked_fill(~counts, 0.0)
        tokens = self.equation.to_far_heads(torch.cat([k, v], -1), dim=-4).movedim(-3, 0)
        states = torch.cat([S[None], share.transpose(-1, -2) @ tokens]).cumsum(0)
        return states, torch.cat([z[None], share.sum(-2).expand(-1, *z.shape)]).cumsum(0)
