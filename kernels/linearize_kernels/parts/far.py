"""The far part: what reads and writes the state S, z.

Two equations of one form. `FeatureMemory` is φ(q)ᵀS with a feature map and a memory; `projection.Projection` is
Linformer's softmax over k slots. Both write tokens into a state and read it, and both say so twice: `fold_one` and
`read_one` for one token (the definition), `forward` and `fold` for many at once.

Shapes: `heads` are query heads, `far` the heads of S and z (`far_heads`); a token that is not there has position -1
and never counts, and sinks are never folded.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize_kernels.parts.combine import as_affine, by_read_head
from linearize_kernels.parts.decay import MEMORIES, delta_solve, elapsed
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap, unit_norm
from linearize_kernels.parts.linformer import Projection
from linearize_kernels.remembered import derived

CEILING = 8.0  # of a key's logarithmic weight, in size: S adds up weights of up to e^8 in fp32


class FeatureMemory(nn.Module):
    """`φ(q_i)ᵀ Σ_{j∈F(i)} D_ij ω(k_j) φ(k_j) v_jᵀ`, and its mass `φ(q_i)ᵀ Σ D_ij ω(k_j) φ(k_j)`.

    ω(k) = exp(w·k + b), softly capped, is learned per head of S: features of fixed size (Hedgehog's add up to 2)
    cannot say by themselves that a key matters to every query, as its exp(q·k) does in softmax. With it, far tokens
    start with about the weight that they have in softmax.
    """

    def __init__(self, equation):
        super().__init__()
        eq = self.equation = equation
        feature_map = FEATURE_MAPS[eq.feature_map]
        self.q_map = feature_map(eq.heads, eq.key_dim, eq.feature_dim, eq.scale)
        self.k_map = None
        if not feature_map.shared:
            self.k_map = feature_map(eq.far_heads, eq.key_dim, eq.feature_dim, eq.scale)
        weight = torch.empty(eq.far_heads, eq.key_dim + 1)
        self.key_weight = nn.Parameter(weight) if eq.key_weight else None
        self.memory = MEMORIES[eq.memory](eq.far_heads, eq.value_dim)
        self.state_width = (self.q_map.feature_dim, eq.value_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        drawn = torch.get_rng_state()
        self.q_map.reset_parameters()
        if self.k_map is not None:  # φ(q)·φ(k) means something where both start as the same map
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(drawn)
                self.k_map.reset_parameters()
        self.memory.reset_parameters()
        if self.key_weight is not None:
            factor = self.q_map.estimate_softmax()
            if self.k_map is not None:
                self.k_map.estimate_softmax()
            nn.init.zeros_(self.key_weight)
            self.key_weight[:, -1] = CEILING * math.atanh(min(-math.log(factor) / CEILING, 0.9))

    def queries(self, q: Tensor) -> Tensor:
        """Compute features of queries, which are grouped by the heads of S that they read.

        `[..., far, g, T, D] -> [..., far, g, T, F]`
        """
        return self.q_map(q.flatten(-4, -3)).unflatten(-3, q.shape[-4:-2])

    def keys(self, k: Tensor) -> Tensor:
        """Compute what is written to S for keys, `[..., kv, T, D] -> [..., far, T, F]`."""
        return self.written(self.equation.to_far_heads(k))

    def written(self, k: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute what is written to S for keys repeated as S has them, `[..., far, T, D] -> [..., far, T, F]`.

        Args:
            counts: `[T]`, 0 for a key that is not written, else 1; or None if all are.
        """
        phi = self.writing_map(k)
        phi = unit_norm(phi) if self.memory.unit_keys else phi
        weight = None if counts is None else counts[:, None]
        if self.key_weight is not None:
            weight = self.weights(k) if weight is None else self.weights(k) * weight
        return phi if weight is None else weight * phi

    @property
    def writing_map(self) -> FeatureMap:
        return self.q_map if self.k_map is None else self.k_map

    def weights(self, k: Tensor) -> Tensor:
        """Compute ω, `[..., far, T, D] -> [..., far, T, 1]`."""
        weight = self.key_weight.to(k.dtype)[:, None] / CEILING
        logarithm = CEILING * (weight[..., :-1] @ k.mT + weight[..., -1:]).tanh()
        return logarithm.exp().mT

    def fold_one(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Sequence[int]) -> None:
        """Write one token of each of B rows into S and z.

        Args:
            S: `[far, B, F, Dv]`; z: `[far, B, F]`; k: `[kv, B, D]`; v: `[kv, B, Dv]`.
            position: the token's position in each row.
        """
        k, v = self.equation.to_far_heads(k), self.equation.to_far_heads(v)
        memory, phi = self.memory, self.writing_map.one_token(k)
        if memory.unit_keys:
            phi = unit_norm(phi)
        if self.key_weight is not None:
            w, b = derived(self, "key_weight", before_cap, k.dtype)
            phi = phi * torch.baddbmm(b, k, w).tanh().mul(CEILING).exp()
        memory.fold_one(S, z, phi, v)

    def read_one(self, q: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Read S and z with one query of each of B rows: q `[heads, B, D]`.

        Returns:
            numerator `[far * B, heads / far, Dv]` and mass `[far * B, heads / far, 1]`.
        """
        phi, S = by_read_head(self.q_map.one_token(q), self.equation.far_heads), S.flatten(0, 1)
        return torch.bmm(phi, S), torch.bmm(phi, z.view(*S.shape[:2], 1))

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
        """Read S, and the tokens k, v that are not folded into it yet.

        Args:
            q: `[..., heads, T, D]`.
            k, v: `[..., kv, N, D]` and `[..., kv, N, Dv]`, a chain of N - new tokens and then the new ones, each after
                its ancestors.
            position: `[..., N]`; -1 or the position of a sink marks a token that does not count.
            seen: `[..., T, N]` bool, the ancestors of each query, itself among them.
            far: `[..., T, N]` bool, the tokens in F(i).
            new: T, or 0 if the queries' own tokens are left out because none of them is far.
            S: `[..., far, F, Dv]`; z: `[..., far, F]`.

        Returns:
            numerator `[..., far, heads / far, T, Dv]` and mass `[..., far, heads / far, T]`.
        """
        eq, memory, length = self.equation, self.memory, q.shape[-2]
        phi_q = eq.fold_queries(self.q_map(q), eq.far_heads)
        read = eq.split_queries(phi_q @ S, length)
        mass = eq.split_queries(phi_q @ z[..., None], length).squeeze(-1)
        if (
            k.shape[-2] == 0 and not torch.is_grad_enabled()
        ):  # else every parameter has a gradient, as DDP wants it
            return read, mass
        phi_k, values = self.keys(k), eq.to_far_heads(v)
        products = eq.split_queries(phi_q @ phi_k.transpose(-1, -2), length)
        far = far[..., None, :, :]
        log_decay = memory.log_decay(values)
        if log_decay is not None:
            counts = position >= eq.sinks
            log_decay = log_decay.masked_fill(~counts[..., None, :], 0.0)
            earlier = before(seen, counts) if new else chain(counts)
            passed = elapsed(log_decay, earlier)
            total = (far.to(q.dtype) @ log_decay[..., None]).squeeze(-1)  # [..., far, T]
            kept = (total[..., :, None] - passed[..., None, :]).masked_fill(~far, float("-inf")).exp()
            products, left = products * kept[..., None, :, :], total.exp()[..., None, :]
            strength = memory.strength(values)
            if strength is not None:
                answers = passed.exp()[..., None] * (phi_k @ S)
                values = delta_solve(phi_k, strength, passed, earlier, values - answers)
            read, mass = left[..., None] * read, left * mass
        products = products.masked_fill(~far[..., None, :, :], 0.0)
        own = eq.split_queries(products.flatten(-3, -2) @ values, length)
        return own + read, products.sum(-1) + mass

    def append(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Fold a chain of tokens k, v `[B, kv, N, D]`, none of them a sink, into S and z; position `[B or 1, N]`."""
        if self.memory.forward_in_time:
            chunk = k[..., None, :, :], v[..., None, :, :], position[..., None, :]
            states, sums = self.fold(S, z, *chunk)
            return states[-1], sums[-1]
        phi = self.keys(k)
        return S + phi.mT @ self.equation.to_far_heads(v), z + phi.sum(-2)

    def fold(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Compute S and z before each of n chunks of a chain and after the last, `[n + 1, B, far, F, Dv]`.

        Args:
            k, v: `[B, kv, n, C, D]`; position: `[B or 1, n, C]`.
        """
        memory, counts = self.memory, position >= self.equation.sinks
        chunks, length = k.shape[-3:-1]

        def flat(x: Tensor) -> Tensor:
            return self.equation.to_far_heads(x.flatten(-3, -2))

        def cut(x: Tensor) -> Tensor:  # [B, far, n * C, X] -> [n, B, far, C, X]
            return x.unflatten(-2, (chunks, length)).movedim(-3, 0)

        phi = cut(self.keys(k.flatten(-3, -2))).masked_fill(~counts.movedim(-2, 0)[:, :, None, :, None], 0.0)
        values = flat(v)
        log_decay = memory.log_decay(values)
        if log_decay is None:
            states = torch.cat([S[None], phi.transpose(-1, -2) @ cut(values)]).cumsum(0)
            return states, torch.cat([z[None], phi.sum(-2)]).cumsum(0)
        counts = counts.movedim(-2, 0)  # [n, B or 1, C]
        log_decay = cut(log_decay[..., None]).squeeze(-1).masked_fill(~counts[:, :, None], 0.0)
        passed = log_decay.cumsum(-1)
        strength, right = memory.strength(values), cut(values)
        kept = phi * (passed[..., -1:] - passed).exp()[..., None]
        if strength is not None:
            strength = cut(strength[..., None]).squeeze(-1)
            right = torch.cat([right, passed.exp()[..., None] * phi], -1)
            right = delta_solve(phi, strength, passed, chain(counts), right)
            right, answers = right[..., : v.shape[-1]], right[..., v.shape[-1] :]
        each_S, each_z = [S], [z]
        for n in range(chunks):
            written = right[n] if strength is None else right[n] - answers[n] @ S
            decay = passed[n, ..., -1].exp()[..., None]
            S = decay[..., None] * S + kept[n].transpose(-1, -2) @ written
            z = decay * z + kept[n].sum(-2)
            each_S.append(S)
            each_z.append(z)
        return torch.stack(each_S), torch.stack(each_z)


def before_cap(key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return w and b of the logarithm of a key's weight, before the soft cap."""
    return as_affine(key_weight / CEILING)


def far_part(equation) -> FeatureMemory:
    """Build the far part of an equation."""
    return FAR_PARTS.get(equation.feature_map, FeatureMemory)(equation)


# Any: they are no `FeatureMemory`, but have what `block` and one token need of it.
FAR_PARTS: dict[str, Any] = {"linformer": Projection}


def chain(counts: Tensor) -> Tensor:
    """Compute which tokens of a chain are before which, `[..., N] -> [..., N, N]` bool, only among those that count."""
    length = counts.shape[-1]
    order = torch.ones(length, length, dtype=torch.bool, device=counts.device).tril(-1)
    return order & counts[..., None, :] & counts[..., :, None]


def before(seen: Tensor, counts: Tensor) -> Tensor:
    """Compute which tokens are before which, of a chain and T new ones after it: `seen [..., T, N] -> [..., N, N]`."""
    new, every = seen.shape[-2:]
    order = chain(counts)
    own = seen & counts[..., None, :] & counts[..., every - new :, None]
    diagonal = torch.eye(new, every, dtype=torch.bool, device=seen.device).roll(every - new, -1)
    return torch.cat([order[..., : every - new, :].expand(*own.shape[:-2], -1, -1), own & ~diagonal], -2)
