"""Memories: modules that define how a token is folded into S and z, and how S and z forget.

A token is folded when it leaves the window or group, in the order of positions:

    none     S ← S + φ(k) vᵀ
    decay    S ← a S + φ(k) vᵀ                                   a: one per head
    gated    S ← a S + φ(k) vᵀ                                   a: from the token's own v
    delta    S ← a (S - β φ̂(k) (φ̂(k)ᵀ S)) + β φ̂(k) vᵀ            a, β: from the token's own v

and z ← a z + φ(k). φ̂ is φ at unit norm. `fold_one` is the definition, for one token. `far.FeatureMemory`
folds many tokens at once: they change S by `Σ_j kept_ij φ_j written_jᵀ`. kept_ij is the decay after token j
up to token i, and written_j is v_j. Under the delta rule, written_j is v_j minus the value that S holds for
k_j already (the WY form, arXiv 2412.06464, sec. 3.3).
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
    """

    forward_in_time = False
    unit_keys = False

    def __init__(self, heads: int, value_dim: int):
        super().__init__()

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters."""

    def log_decay(self, v: Tensor) -> Tensor | None:
        """Return the logarithm of the decay of N tokens, `[..., heads, N]`, or None without decay.

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

    def __init__(self, heads: int, value_dim: int):
        super().__init__(heads, value_dim)
        self.decay_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        per_token = torch.linspace(math.log(32), math.log(512), len(self.decay_bias)).neg().exp()
        self.decay_bias.copy_(torch.log(torch.expm1(-torch.log1p(-per_token))))

    def log_decay(self, v: Tensor) -> Tensor:
        rate = softplus(self.decay_bias.to(v.dtype))[:, None]
        return -rate.expand(*v.shape[:-3], *v.shape[-3:-1])

    def fold_one(self, S: Tensor, z: Tensor, phi: Tensor, v: Tensor) -> None:
        decay = self.log_decay(v).exp()[..., None]  # rows in the place of tokens
        S.mul_(decay[..., None])
        super().fold_one(S, z.mul_(decay), phi, v)


class Gated(Decay):
    """A decay computed from the token's value, per head: `log a = -softplus(w·v + b)`.

    This is the scalar gate of Mamba-2 (arXiv 2405.21060), with the value instead of the hidden state. Over
    the heads it starts with memories of 1 / -log a = 64 to 4096 tokens: a is near 1, because the softmax that
    is replaced does not decay.
    """

    def __init__(self, heads: int, value_dim: int):
        super().__init__(heads, value_dim)
        self.decay_weight = nn.Parameter(torch.empty(heads, value_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        rate = torch.linspace(math.log(64), math.log(4096), len(self.decay_bias)).neg().exp()
        self.decay_bias.copy_(torch.log(torch.expm1(rate)))
        self.decay_weight.zero_()

    def log_decay(self, v: Tensor) -> Tensor:
        weight, bias = self.decay_weight.to(v.dtype), self.decay_bias.to(v.dtype)
        return -softplus((v @ weight[:, :, None]).squeeze(-1) + bias[:, None])


class Delta(Gated):
    """The gated delta rule (arXiv 2412.06464, eq. 10): a token replaces a share β of the value that S holds
    for its key.

    β = sigmoid(w·v + b) is computed from the token's value, per head. It is 1/2 at the start.
    """

    unit_keys = True

    def __init__(self, heads: int, value_dim: int):
        super().__init__(heads, value_dim)
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
        decay, strength = self.log_decay(v).exp()[..., None], self.strength(v)[..., None]
        S.mul_(decay[..., None])
        answer = (phi[..., None, :] @ S).squeeze(-2)
        S.addcmul_((strength * phi)[..., None], (v - answer)[..., None, :])
        z.mul_(decay).add_(phi)


MEMORIES = {"none": Sum, "decay": Decay, "gated": Gated, "delta": Delta}


def elapsed(log_decay: Tensor, earlier: Tensor) -> Tensor:
    """Sum the logarithms of decays over each token and the tokens before it: `[..., heads, N]`.

    Args:
        log_decay: `[..., heads, N]`.
        earlier: `[..., N, N]` bool, `earlier[i, j]` is True if token j is before token i (in a tree, on its
            path).
    """
    before = earlier.to(log_decay.dtype)[..., None, :, :] @ log_decay[..., None]
    return log_decay + before.squeeze(-1)


def delta_solve(phi: Tensor, strength: Tensor, elapsed: Tensor, earlier: Tensor, right: Tensor) -> Tensor:
    """Compute what the delta rule writes for N tokens, `[..., heads, N, X]`.

    It is the solution u of `u_j = β_j (right_j - Σ_{m before j} e^{c_j - c_m} (φ_j·φ_m) u_m)`.

    Args:
        phi: `[..., heads, N, F]`, the features φ at unit norm. Earlier tokens come first.
        strength: β, `[..., heads, N]`.
        elapsed: c, `[..., heads, N]`, the logarithm of all decays up to and with each token.
        earlier: `[..., N, N]` bool, `earlier[i, j]` is True if token j is before token i.
        right: `[..., heads, N, X]`.
    """
    earlier = earlier[..., None, :, :]
    kept = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(~earlier, float("-inf")).exp()
    system = strength[..., None] * kept * (phi @ phi.transpose(-1, -2))
    return torch.linalg.solve_triangular(system, strength[..., None] * right, upper=False, unitriangular=True)
