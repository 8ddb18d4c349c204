"""How the state forgets: what folding a token does to S and z.

Tokens are folded when they leave the near part, in the order of their positions:

    none     S ← S + φ(k) vᵀ
    decay    S ← a S + φ(k) vᵀ                                   a: one per head
    gated    S ← a S + φ(k) vᵀ                                   a: from the token's own v
    delta    S ← a (S - β φ̂(k) (φ̂(k)ᵀ S)) + β φ̂(k) vᵀ            a, β: from the token's own v

and z ← a z + φ(k). `fold_one` says it for one token; `kept` and `written` give the same for many at once: all that
a set of tokens does to S is `Σ_j kept_ij φ_j written_jᵀ`, with written = v except under the delta rule, where it is
v less what S already answers for k (the WY form, arXiv 2412.06464, sec. 3.3).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Sum(nn.Module):
    """Nothing is forgotten.

    Attributes:
        forward_in_time: whether tokens are written one after the other, from S on: a sum would not do.
        unit_keys: whether keys' features are written at unit norm.
    """

    forward_in_time = False
    unit_keys = False

    def __init__(self, heads: int, value_dim: int):
        super().__init__()

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters."""

    def log_decay(self, v: Tensor) -> Tensor | None:
        """Return the logarithm of the decay, `[..., heads, N, Dv] -> [..., heads, N]`, or None if nothing decays."""
        return None

    def strength(self, v: Tensor) -> Tensor | None:
        """Return β of the delta rule, `[..., heads, N]`, or None for other memories."""
        return None

    def fold_one(self, S: Tensor, z: Tensor, phi: Tensor, v: Tensor) -> None:
        """Write one token of each of B rows into S and z.

        Args:
            S: `[heads, B, F, Dv]`; z, phi: `[heads, B, F]`; v: `[heads, B, Dv]`.
        """
        S.addcmul_(phi[..., None], v[..., None, :])
        z.add_(phi)


class Decay(Sum):
    """A learned decay per head, which starts as in RetNet: 1 - 1/32 to 1 - 1/512 (arXiv 2307.08621)."""

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
    """A decay from the token: `log a = -softplus(w·v + b)` per head (the scalar gate of Mamba-2, arXiv 2405.21060,
    with the value in the place of the hidden state). It starts near 1, with memories of 64 to 4096 tokens: the
    softmax that is replaced does not decay.
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
    """The gated delta rule (arXiv 2412.06464, eq. 10): a token first takes away what S answers for its key. Its
    strength is β = sigmoid(w·v + b), 1/2 at the start.
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
    """`Σ_m log_decay_m` over each token and those before it on its path: `[..., heads, N]`, `earlier [..., N, N]`."""
    before = earlier.to(log_decay.dtype)[..., None, :, :] @ log_decay[..., None]
    return log_decay + before.squeeze(-1)


def delta_solve(phi: Tensor, strength: Tensor, elapsed: Tensor, earlier: Tensor, right: Tensor) -> Tensor:
    """Solves `u_j = β_j (right_j - Σ_{m before j} e^{c_j - c_m} (φ_j·φ_m) u_m)`.

    Args:
        phi: `[..., heads, N, F]`, tokens after those before them.
        strength, elapsed: β and c, `[..., heads, N]`.
        earlier: `[..., N, N]` bool, which tokens are before which.
        right: `[..., heads, N, X]`.
    """
    earlier = earlier[..., None, :, :]
    kept = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(~earlier, float("-inf")).exp()
    system = strength[..., None] * kept * (phi @ phi.transpose(-1, -2))
    return torch.linalg.solve_triangular(system, strength[..., None] * right, upper=False, unitriangular=True)
