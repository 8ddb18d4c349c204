"""Memories: modules that define how a token is folded into S and z, and how S and z forget.

A token is folded when it leaves the window or group, in the order of positions:

    none              S ← S + φ(k) vᵀ
    decay             S ← a S + φ(k) vᵀ                            a: one per head
    gated             S ← a S + φ(k) vᵀ                            a: from the token's own v
    gated-channels    S ← diag(a) S + φ(k) vᵀ                      a: one per feature, from v
    delta             S ← (I - β φ̂(k) φ̂(k)ᵀ) a S + β φ̂(k) vᵀ       a, β: from the token's own v
    delta-channels    S ← (I - β φ̂(k) φ̂(k)ᵀ) diag(a) S + β φ̂(k) vᵀ   a: one per feature, from v

and z ← a z + φ(k). φ̂ is φ at unit norm. `fold_one` is the definition, for one token. `far.FeatureMemory`
folds many tokens at once: they change S by `Σ_j (kept_ij ⊙ φ_j) written_jᵀ`. kept_ij is the decay after token
j up to token i, and written_j is v_j. Under the delta rule, written_j is v_j minus the value that S holds for
k_j already (the WY form, arXiv 2412.06464, sec. 3.3).

In shapes, X is the number of decays per head: F with one per feature (a channel), else 1.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Sum(nn.Module):
    """The memory that forgets nothing: S and z are plain sums. It is also the base class of the other
    memories.

    Attributes:
        forward_in_time: True if the sums depend on the order of the tokens, so that tokens must be added in
            order.
        unit_keys: True if the keys' features are scaled to unit norm before they are added.
        per_channel: True if each feature has a decay of its own, else one per head.
    """

    forward_in_time = False
    unit_keys = False
    per_channel = False

    def __init__(self, heads: int, value_dim: int, features: int):
        super().__init__()

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters."""

    def log_decay(self, v: Tensor) -> Tensor | None:
        """Return the logarithm of the decay of N tokens, `[..., heads, N, X]`, or None without decay.

        Args:
            v: the tokens' values, `[..., heads, N, Dv]`. `heads` are the heads of S.
        """
        return None

    def strength(self, v: Tensor) -> Tensor | None:
        """Return how strongly N tokens are written (β of the delta rule), `[..., heads, N]`. Other memories
        return None.

        Args:
            v: the tokens' values, `[..., heads, N, Dv]`.
        """
        return None

    def fold_one(self, S: Tensor, z: Tensor, phi: Tensor, v: Tensor) -> None:
        """Add one token of each of B rows to the running sums S and z, in place. Other memories let the sums
        decay first.

        Args:
            S: `[heads, B, F, Dv]`, where `heads` are the heads of S.
            z: `[heads, B, F]`.
            phi: `[heads, B, F]`, the features of the token's key.
            v: `[heads, B, Dv]`.
        """
        S.addcmul_(phi[..., None], v[..., None, :])
        z.add_(phi)


class Decay(Sum):
    """A learned decay a per head. Over the heads it starts at 1 - 1/32 to 1 - 1/512, as in RetNet (arXiv
    2307.08621).
    """

    forward_in_time = True

    def __init__(self, heads: int, value_dim: int, features: int):
        super().__init__(heads, value_dim, features)
        self.decay_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        per_token = torch.linspace(math.log(32), math.log(512), len(self.decay_bias)).neg().exp()
        self.set_rates(-torch.log1p(-per_token))

    @torch.no_grad()
    def set_rates(self, rates: Tensor) -> None:
        """Set a constant decay per head, `a = e^-rate`: a token's value has no influence until training gives
        it some.

        Args:
            rates: `[heads]`, above 0.
        """
        bias = torch.log(torch.expm1(rates))  # the inverse of softplus
        self.decay_bias.copy_(bias.view(-1, *[1] * (self.decay_bias.dim() - 1)))

    def log_decay(self, v: Tensor) -> Tensor:
        rate = softplus(self.decay_bias.to(v.dtype))[:, None, None]
        return -rate.expand(*v.shape[:-1], 1)

    def fold_one(self, S: Tensor, z: Tensor, phi: Tensor, v: Tensor) -> None:
        decay = self.log_decay(v).exp()  # [heads, B, X]: rows in the place of tokens
        S.mul_(decay[..., None])
        super().fold_one(S, z.mul_(decay), phi, v)


class Gated(Decay):
    """A decay computed from the token's value, per head: `log a = -softplus(w·v + b)`.

    This is the scalar gate of Mamba-2 (arXiv 2405.21060), with the value instead of the hidden state. Over
    the heads it starts with memories of 1 / -log a = 64 to 4096 tokens: a is near 1, because the softmax that
    is replaced does not decay.
    """

    def __init__(self, heads: int, value_dim: int, features: int):
        super().__init__(heads, value_dim, features)
        decays = (features,) if self.per_channel else ()
        self.decay_bias = nn.Parameter(torch.empty(heads, *decays))
        self.decay_weight = nn.Parameter(torch.empty(heads, value_dim, *decays))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.set_rates(torch.linspace(math.log(64), math.log(4096), len(self.decay_bias)).neg().exp())
        self.decay_weight.zero_()

    def log_decay(self, v: Tensor) -> Tensor:
        heads, value_dim = self.decay_weight.shape[:2]
        weight = self.decay_weight.to(v.dtype).view(heads, value_dim, -1)
        return -softplus(v @ weight + self.decay_bias.to(v.dtype).view(heads, 1, -1))


class GatedChannels(Gated):
    """A decay computed from the token's value, per feature: `log a = -softplus(Wᵀv + b)`.

    This is the gate of GLA (arXiv 2312.06635, eq. 4 and sec. 4.4), with the value instead of the hidden
    state, and a full matrix instead of one of low rank.
    """

    per_channel = True


class Delta(Gated):
    """The gated delta rule (arXiv 2412.06464, eq. 10): a token replaces a share β of the value that S holds
    for its key.

    β = sigmoid(w·v + b) is computed from the token's value, per head. It is 1/2 at the start.
    """

    unit_keys = True

    def __init__(self, heads: int, value_dim: int, features: int):
        super().__init__(heads, value_dim, features)
        self.strength_weight = nn.Parameter(torch.empty(heads, value_dim))
        self.strength_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.strength_weight.zero_()
        self.strength_bias.zero_()

    def strength(self, v: Tensor) -> Tensor:
        weight, bias = self.strength_weight.to(v.dtype), self.strength_bias.to(v.dtype)
        return ((v @ weight[:, :, None]).squeeze(-1) + bias[:, None]).sigmoid()

    def fold_one(self, S: Tensor, z: Tensor, phi: Tensor, v: Tensor) -> None:
        decay, strength = self.log_decay(v).exp(), self.strength(v)[..., None]
        S.mul_(decay[..., None])
        answer = (phi[..., None, :] @ S).squeeze(-2)
        S.addcmul_((strength * phi)[..., None], (v - answer)[..., None, :])
        z.mul_(decay).add_(phi)


class DeltaChannels(Delta):
    """The delta rule with a decay per feature: Kimi Delta Attention (arXiv 2510.26692, eq. 1)."""

    per_channel = True


MEMORIES = {
    "none": Sum,
    "decay": Decay,
    "gated": Gated,
    "gated-channels": GatedChannels,
    "delta": Delta,
    "delta-channels": DeltaChannels,
}


def elapsed(log_decay: Tensor, earlier: Tensor) -> Tensor:
    """Sum the logarithms of decays over each token and the tokens before it: `[..., heads, N, X]`.

    Args:
        log_decay: `[..., heads, N, X]`.
        earlier: `[..., N, N]` bool, `earlier[i, j]` is True if token j is before token i (in a tree, on its
            path).
    """
    return log_decay + earlier.to(log_decay.dtype)[..., None, :, :] @ log_decay


def decayed_products(phi_q: Tensor, phi_k: Tensor, log_q: Tensor, log_k: Tensor, visible: Tensor) -> Tensor:
    """Compute `Σ_f φ_q,if φ_k,jf e^{l_if - l_jf}` of T queries i and N keys j, `[..., heads, g, T, N]`.

    It is 0 where a query does not see a key. g is the number of query heads of a head of S.

    Args:
        phi_q: `[..., heads, g, T, F]`, the features of queries.
        phi_k: `[..., heads, N, F]`, the features of keys.
        log_q: `[..., heads, T, X]`, the logarithm of all decays up to each query.
        log_k: `[..., heads, N, X]`, the same up to each key.
        visible: `[..., T, N]` bool, True where query i sees key j.
    """
    visible = visible[..., None, :, :, None]
    kept = (log_q[..., :, None, :] - log_k[..., None, :, :]).masked_fill(~visible, float("-inf")).exp()
    if kept.shape[-1] == 1:  # one decay for all features: it stays outside of the sum
        products = phi_q.flatten(-3, -2) @ phi_k.mT
        return products.unflatten(-2, phi_q.shape[-3:-1]) * kept.squeeze(-1)[..., None, :, :]
    kept = kept * phi_k[..., None, :, :]  # [..., heads, T, N, F]
    return (kept @ phi_q.movedim(-3, -1)).movedim(-1, -3)


def delta_solve(phi: Tensor, strength: Tensor, elapsed: Tensor, earlier: Tensor, right: Tensor) -> Tensor:
    """Compute what the delta rule writes for N tokens, `[..., heads, N, Y]`.

    It is the solution u of `u_j = β_j (right_j - Σ_{m before j} Σ_f e^{c_jf - c_mf} φ_jf φ_mf u_m)`.

    Args:
        phi: `[..., heads, N, F]`, the features φ at unit norm. Earlier tokens come first.
        strength: β, `[..., heads, N]`.
        elapsed: c, `[..., heads, N, X]`, the logarithm of all decays up to and with each token.
        earlier: `[..., N, N]` bool, `earlier[i, j]` is True if token j is before token i.
        right: `[..., heads, N, Y]`.
    """
    products = decayed_products(phi[..., None, :, :], phi, elapsed, elapsed, earlier).squeeze(-3)
    strength = strength[..., None]
    return torch.linalg.solve_triangular(
        strength * products, strength * right, upper=False, unitriangular=True
    )
