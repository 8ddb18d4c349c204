"""The linear part: modules that write tokens into the state S, z and read it.

There are two. `FeatureMemory` reads φ(q)ᵀS, with a feature map φ and a memory (see `decay`).
`linformer.Projection` computes a softmax over k slots. Each has two implementations: `fold_one` and
`read_one` for one token (the definition), and `fold`, `append` and `forward` for many tokens.

In shapes, `heads` is the number of query heads and `far` the number of heads of S and z
(`Equation.far_heads`). A token with position -1 is a pad or an empty slot, which is ignored. Attention sinks
are never folded.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize_kernels.parts.combine import as_affine, by_read_head
from linearize_kernels.parts.decay import MEMORIES, decayed_products, delta_solve, elapsed
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap, unit_norm
from linearize_kernels.parts.linformer import Projection
from linearize_kernels.remembered import derived

CEILING = 8.0  # of a key's logarithmic weight, in size: S adds up weights of up to e^8 in fp32


class FeatureMemory(nn.Module):
    """Linear attention to the far tokens F(i) (outside the window) of each query i, with a feature map φ.

    The numerator is `φ(q_i)ᵀ Σ_{j∈F(i)} D_ij ω(k_j) φ(k_j) v_jᵀ`. Its normaliser, which the code calls mass,
    is `φ(q_i)ᵀ Σ_{j∈F(i)} D_ij ω(k_j) φ(k_j)`. D_ij is the memory's decay.

    ω(k) = exp(w·k + b), softly capped, is an optional weight of a key, learned per head of S. In softmax, a
    long key has a large exp(q·k) for many queries. Features of fixed size (Hedgehog's add up to 2) cannot
    express that without ω. With ω, far tokens start with about the weight that they have in softmax.

    Attributes:
        q_map: the feature map of queries.
        k_map: the feature map of keys, or None if the keys use `q_map`.
        key_weight: w and b of ω, `[far, D + 1]`, or None if ω is 1.
        memory: how S forgets.
        state_width: F and Dv, the last two dimensions of S.
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
        self.memory = MEMORIES[eq.memory](eq.far_heads, eq.value_dim, self.q_map.feature_dim)
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
        """Compute the features `[..., far, g, T, F]` of queries `[..., far, g, T, D]`.

        g is the number of query heads that read one head of S.
        """
        return self.q_map(q.flatten(-4, -3)).unflatten(-3, q.shape[-4:-2])

    def keys(self, k: Tensor) -> Tensor:
        """Compute the weighted features ω(k) φ(k) `[..., far, T, F]` of keys `[..., kv, T, D]`, which are
        added to S and z.
        """
        return self.written(self.equation.to_far_heads(k))

    def written(self, k: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the weighted features ω(k) φ(k) `[..., far, T, F]` of keys, which are added to S and z.

        φ has unit norm under the delta rule.

        Args:
            k: `[..., far, T, D]`, keys that are repeated to the heads of S already.
            counts: `[T]`, 0 for a key whose result is to be zero, else 1. None if no key is.
        """
        phi = self.writing_map(k)
        phi = unit_norm(phi) if self.memory.unit_keys else phi
        weight = None if counts is None else counts[:, None]
        if self.key_weight is not None:
            weight = self.weights(k) if weight is None else self.weights(k) * weight
        return phi if weight is None else weight * phi

    @property
    def writing_map(self) -> FeatureMap:
        """Return the feature map of keys."""
        return self.q_map if self.k_map is None else self.k_map

    def weights(self, k: Tensor) -> Tensor:
        """Compute the learned weights ω(k) `[..., far, T, 1]` of keys `[..., far, T, D]`. `key_weight` must
        not be None.
        """
        weight = self.key_weight.to(k.dtype)[:, None] / CEILING
        logarithm = CEILING * (weight[..., :-1] @ k.mT + weight[..., -1:]).tanh()
        return logarithm.exp().mT

    def fold_one(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Sequence[int]) -> None:
        """Add one token of each of B rows to the running sums S and z, in place, after their decay.

        Args:
            S: `[far, B, F, Dv]`.
            z: `[far, B, F]`.
            k, v: `[kv, B, D]` and `[kv, B, Dv]`.
            position: the token's position in each of the B rows. Only Linformer's projection reads it.
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
        """Compute φ(q) S and φ(q) z for one query of each of B rows.

        In the shapes, `far` is the number of heads of S (`far_heads`).

        Args:
            q: `[heads, B, D]`.
            S: `[far, B, F, Dv]`.
            z: `[far, B, F]`.

        Returns:
            The numerator φ(q) S, `[far * B, heads / far, Dv]`, and its normaliser φ(q) z,
            `[far * B, heads / far, 1]`.
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
        """Read the far tokens (outside the window) of T queries: those already in S and z, and those among N
        given tokens.

        Args:
            q: `[..., heads, T, D]`.
            k, v: `[..., kv, N, D]` and `[..., kv, N, Dv]`, tokens that are not in S yet. The first N - new of
                them follow one another; then come the queries' own tokens, each after its ancestors.
            position: `[..., N]`. A token whose position is -1 or that of a sink is ignored.
            seen: `[..., T, N]` bool, True for the ancestors of each query and its own token.
            far: `[..., T, N]` bool, True for the far tokens of each query.
            new: the number of the queries' own tokens in k, v: T, or 0 if none of them can be far.
            S: `[..., far, F, Dv]`.
            z: `[..., far, F]`.

        Returns:
            The numerator `[..., far, heads / far, T, Dv]` and its normaliser `[..., far, heads / far, T]`.
        """
        eq, memory, length = self.equation, self.memory, q.shape[-2]
        phi_q = eq.fold_queries(self.q_map(q), eq.far_heads)
        if (
            k.shape[-2] == 0 and not torch.is_grad_enabled()
        ):  # else every parameter has a gradient: DDP needs it
            return self.read(phi_q, S, z, length)
        phi_k, values = self.keys(k), eq.to_far_heads(v)
        log_decay = memory.log_decay(values)
        if log_decay is None:
            read, mass = self.read(phi_q, S, z, length)
            products = eq.split_queries(phi_q @ phi_k.transpose(-1, -2), length)
            products = products.masked_fill(~far[..., None, None, :, :], 0.0)
        else:
            counts = position >= eq.sinks
            log_decay = log_decay.masked_fill(~counts[..., None, :, None], 0.0)
            earlier = before(seen, counts) if new else chain(counts)
            passed = elapsed(log_decay, earlier)
            total = far.to(q.dtype)[..., None, :, :] @ log_decay  # [..., far, T, X]
            each = eq.split_queries(phi_q, length)
            products = decayed_products(each, phi_k, total, passed, far)
            strength = memory.strength(values)
            if strength is not None:
                answers = (passed.exp() * phi_k) @ S
                values = delta_solve(phi_k, strength, passed, earlier, values - answers)
            each = each * total.exp()[..., None, :, :]
            read, mass = self.read(each.flatten(-3, -2), S, z, length)
        own = eq.split_queries(products.flatten(-3, -2) @ values, length)
        return own + read, products.sum(-1) + mass

    def read(self, phi_q: Tensor, S: Tensor, z: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Compute φ(q)ᵀS `[..., far, g, T, Dv]` and φ(q)ᵀz `[..., far, g, T]`.

        Args:
            phi_q: `[..., far, g * T, F]`, the features of the queries.
            S: `[..., far, F, Dv]`.
            z: `[..., far, F]`.
            length: T.
        """
        split = self.equation.split_queries
        return split(phi_q @ S, length), split(phi_q @ z[..., None], length).squeeze(-1)

    def append(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens that follow one another to the running sums S and z, and return the new S and z.

        Args:
            S: `[B, far, F, Dv]`.
            z: `[B, far, F]`.
            k, v: `[B, kv, N, D]` and `[B, kv, N, Dv]`. None of the tokens is a sink.
            position: `[B or 1, N]`.
        """
        if self.memory.forward_in_time:
            chunk = k[..., None, :, :], v[..., None, :, :], position[..., None, :]
            states, sums = self.fold(S, z, *chunk)
            return states[-1], sums[-1]
        phi = self.keys(k)
        return S + phi.mT @ self.equation.to_far_heads(v), z + phi.sum(-2)

    def fold(self, S: Tensor, z: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the running sums S and z before each of n chunks of tokens, and after the last chunk.

        Args:
            S: `[B, far, F, Dv]`, before the first chunk.
            z: `[B, far, F]`.
            k, v: `[B, kv, n, C, D]` and `[B, kv, n, C, Dv]`.
            position: `[B or 1, n, C]`. Tokens whose position is -1 or that of a sink are not added.

        Returns:
            S `[n + 1, B, far, F, Dv]` and z `[n + 1, B, far, F]`.
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
        log_decay = cut(log_decay).masked_fill(~counts[:, :, None, :, None], 0.0)
        passed = log_decay.cumsum(-2)  # [n, B, far, C, X]
        strength, right = memory.strength(values), cut(values)
        kept = phi * (passed[..., -1:, :] - passed).exp()
        if strength is not None:
            strength = cut(strength[..., None]).squeeze(-1)
            right = torch.cat([right, passed.exp() * phi], -1)
            right = delta_solve(phi, strength, passed, chain(counts), right)
            right, answers = right[..., : v.shape[-1]], right[..., v.shape[-1] :]
        each_S, each_z = [S], [z]
        for n in range(chunks):
            written = right[n] if strength is None else right[n] - answers[n] @ S
            decay = passed[n, ..., -1, :].exp()
            S = decay[..., None] * S + kept[n].transpose(-1, -2) @ written
            z = decay * z + kept[n].sum(-2)
            each_S.append(S)
            each_z.append(z)
        return torch.stack(each_S), torch.stack(each_z)


def before_cap(key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights `[far, D, 1]` and biases `[far, 1, 1]` of the argument of tanh in
    `log ω(k) = CEILING tanh(w·k + b)`.
    """
    return as_affine(key_weight / CEILING)


def far_part(equation) -> FeatureMemory:
    """Build the linear part of an equation: a class in FAR_PARTS if its `feature_map` is listed there, or
    FeatureMemory.
    """
    return FAR_PARTS.get(equation.feature_map, FeatureMemory)(equation)


# Any: they are no `FeatureMemory`, but have what `block` and one token need of it.
FAR_PARTS: dict[str, Any] = {"linformer": Projection}


def chain(counts: Tensor) -> Tensor:
    """Return the order of N tokens that follow one another: `[..., N, N]` bool, `[i, j]` is True if j is
    before i.

    Args:
        counts: `[..., N]` bool, False for pads and sinks. Pairs with such a token are False.
    """
    length = counts.shape[-1]
    order = torch.ones(length, length, dtype=torch.bool, device=counts.device).tril(-1)
    return order & counts[..., None, :] & counts[..., :, None]


def before(seen: Tensor, counts: Tensor) -> Tensor:
    """Return which tokens precede which, `[..., N, N]` bool, for N tokens whose last T are nodes of a token tree.

    `[i, j]` is True if token j is before token i in the text, or on the node's path.

    Args:
        seen: `[..., T, N]` bool, True for the ancestors of each node and itself.
        counts: `[..., N]` bool, False for pads and sinks. Pairs with such a token are False.
    """
    new, every = seen.shape[-2:]
    order = chain(counts)
    own = seen & counts[..., None, :] & counts[..., every - new :, None]
    diagonal = torch.eye(new, every, dtype=torch.bool, device=seen.device).roll(every - new, -1)
    return torch.cat([order[..., : every - new, :].expand(*own.shape[:-2], -1, -1), own & ~diagonal], -2)
