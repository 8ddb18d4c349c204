"""Combines: modules that join the local and the linear part of the equation into one output.

A combine has two implementations of the same formula. `define` is the definition, for one token and one head:
`scores` and `values` are lists over the local tokens L(i), and `far` holds what was read of the far tokens
F(i), or is None without a linear part. `forward` computes whole blocks of T queries and N tokens; the bool
mask `local` selects L(i):

    q [..., kv, group, T, D], scores and local [..., kv, group, T, N], values [..., kv, N, Dv],
    far.out [..., kv, group, T, Dv], far.mass [..., kv, group, T] -> output [..., kv, group, T, Dv]

`group` is the number of query heads of a KV head. A new combine is entered in `COMBINES`, by its name in
recipes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize_kernels.remembered import derived

TINY = 1e-12  # below any normaliser that stands for something


class Far(NamedTuple):
    """The sums that a query has read of its far tokens (outside the window or group).

    Attributes:
        out: the numerator, Σ of weight times value. The last dimension is Dv.
        mass: the normaliser, Σ of the weights.
        any: True where the query has a far token.
    """

    out: Tensor
    mass: Tensor
    any: Tensor | bool


class Combine(nn.Module):
    """The base class of combines, modules that join the local and the linear part of an output.

    Attributes:
        mix: only in `Shared`: `[heads, D + 1]`, weights and bias of a linear function of q, which gives the
            logit of the linear part. It is None if the equation has only one of the two parts.
        factor: only in `Unnormalised`: `[heads]`, the linear part's factor, or None without a linear part.
    """

    mix: nn.Parameter | None
    factor: nn.Parameter | None

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__()

    def reset_parameters(self) -> None:
        """Set all parameters to their values at the start of a conversion."""

    def define(self, head: int, q: Tensor, scores: list, values: list, far: Far | None) -> Tensor:
        """Join the local and the linear part of the output, for one token i and one head. This is the
        definition.

        Args:
            head: the index of the query head.
            q: `[D]`.
            scores: the local scores, a scalar tensor for each local token (in the window or a sink).
            values: the values `[Dv]` of these tokens. It holds one zero vector if there are none.
            far: what was read of the other tokens, or None without a linear part.

        Returns:
            `[Dv]`.
        """
        raise NotImplementedError

    def one_token(
        self,
        q: Tensor,
        scores: Tensor,
        local: Tensor | None,
        values: Tensor,
        far: Far | None,
        taps: Tensor | None,
    ) -> Tensor:
        """Join the local and the linear part of the output for one query of each of B rows, and add the conv.

        Args:
            q: `[heads, B, D]`.
            scores: `[kv * B, group, N]`, the local scores of N tokens.
            local: bool, broadcasts to scores, True for local tokens (in the window or a sink). None means all
                N tokens.
            values: `[kv * B, N, Dv]`.
            far: the numerator `out` `[kv * B, group, Dv]` and its normaliser `mass` `[kv * B, group, 1]`.
                `any` is a bool tensor that broadcasts to the mass, or True. None without a linear part.
            taps: `[kv * B, group, R]`, the conv's weights of the last R values, or None without a conv.

        Returns:
            `[kv * B, group, Dv]`.
        """
        batch = q.shape[1]
        kv = len(scores) // batch

        def by_row(x: Tensor) -> Tensor:  # [kv * B or 1, ..] -> [B or 1, kv or 1, ..]
            return x.unflatten(0, (kv, batch)).transpose(0, 1) if len(x) > 1 else x[None]

        local = scores.new_ones(1, 1, 1, dtype=torch.bool) if local is None else local
        if far is not None:
            any_far = far.any if isinstance(far.any, Tensor) else torch.ones_like(far.mass, dtype=torch.bool)
            far = Far(by_row(far.out)[..., None, :], by_row(far.mass), by_row(any_far))
        own = (by_row(x)[..., None, :] for x in (by_read_head(q, kv), scores, local))
        out = self(*own, by_row(values), far).squeeze(-2).transpose(0, 1).reshape(*scores.shape[:2], -1)
        return out if taps is None else out + torch.bmm(taps, values[:, -taps.shape[-1] :])


class Shared(Combine):
    """One normaliser for both parts: weights `exp(s - m)` of local tokens with scores s, and
    `exp(mix(q) - m) φ(q)·φ(k)` of all others.

    `mix` is a learned linear function of q per head. m is the maximum of the local scores, and of mix(q) too
    if the query has tokens that are not local.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__(heads, key_dim, value_dim, has_local, has_far)
        self.mix = nn.Parameter(torch.empty(heads, key_dim + 1)) if has_local and has_far else None

    def reset_parameters(self) -> None:
        if self.mix is not None:
            nn.init.zeros_(self.mix)

    def define(self, head, q, scores, values, far):
        mix = q.new_zeros(())
        if self.mix is not None:
            weight = self.mix[head].to(q.dtype)
            mix = weight[:-1] @ q + weight[-1]
        any_far = far is not None and far.any
        ceiling = max([*scores, mix] if any_far else scores, default=mix)
        weights = [(score - ceiling).exp() for score in scores]
        total, out = sum(weights), weighted(weights, values)
        if any_far:
            factor = (mix - ceiling).exp()
            total, out = total + factor * far.mass, out + factor * far.out
        return out / max(total, TINY)

    def forward(self, q: Tensor, scores: Tensor, local: Tensor, values: Tensor, far: Far | None) -> Tensor:
        if far is None:
            return softmax(scores, local, values)
        mix = q.new_zeros(()) if self.mix is None else per_head(self.mix, q)
        mix = torch.where(far.any, mix, float("-inf"))  # type: ignore[arg-type]  # a tensor in blocks
        scores = scores.masked_fill(~local, float("-inf"))
        ceiling = finite(torch.maximum(scores.detach().amax(-1), mix.detach()))
        weights, factor = (scores - ceiling[..., None]).exp(), (mix - ceiling).exp()
        total = positive(weights.sum(-1) + factor * far.mass)
        return (attend(weights, values) + factor[..., None] * far.out) / total

    def one_token(
        self,
        q: Tensor,
        scores: Tensor,
        local: Tensor | None,
        values: Tensor,
        far: Far | None,
        taps: Tensor | None,
    ) -> Tensor:
        if self.mix is None or far is None:
            return super().one_token(q, scores, local, values, far, taps)
        # The far part is one more key: its weight is exp(mix(q)) times its mass, and its value a mean.
        w, b = derived(self, "mix", as_affine, q.dtype)
        mass = far.mass.clamp_min(torch.finfo(q.dtype).tiny)
        logit = by_read_head(torch.baddbmm(b, q, w), len(mass) // q.shape[1]) + mass.log()
        if far.any is not True:
            logit = logit.masked_fill(~far.any, float("-inf"))  # type: ignore[arg-type]  # never False
        if local is not None:
            scores = scores.masked_fill(~local, float("-inf"))
        weights = torch.cat([logit, scores], -1).softmax(-1)
        if taps is not None:
            weights[..., -taps.shape[-1] :].add_(taps)
        return torch.addcmul(torch.bmm(weights[..., 1:], values), weights[..., :1], far.out / mass)


class Lolcats(Combine):
    """LoLCATs' combine (arXiv 2410.10254): one normaliser, with weights `γ exp(s - max s)` of local tokens
    with scores s, and `φ(q)·φ(k)` of all others.

    γ is learned per head and starts at 0.1. The maximum is that of the local scores alone. It changes the
    result, because the other weights are not divided by its exponential.
    """

    start = 0.1

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__(heads, key_dim, value_dim, has_local, has_far)
        self.gamma_logit = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma_logit, math.log(self.start / (1 - self.start)))

    def define(self, head, q, scores, values, far):
        gamma = self.gamma_logit[head].to(q.dtype).sigmoid()
        weights = [gamma * (score - max(scores)).exp() for score in scores]
        total, out = sum(weights), weighted(weights, values)
        if far is not None and far.any:
            total, out = total + far.mass, out + far.out
        return out / max(total, TINY)

    def forward(self, q: Tensor, scores: Tensor, local: Tensor, values: Tensor, far: Far | None) -> Tensor:
        gamma = self.gamma_logit.to(q.dtype).sigmoid().view(*q.shape[-4:-2], 1, 1)
        scores = scores.masked_fill(~local, float("-inf"))
        weights = gamma * (scores - finite(scores.amax(-1))[..., None]).exp()
        out, total = attend(weights, values), weights.sum(-1)
        return out / positive(total) if far is None else (out + far.out) / positive(total + far.mass)


class Unnormalised(Combine):
    """A sum without a normaliser (arXiv 2406.07368): the scores are the weights of the local values.

    The linear part's numerator is multiplied by a learned factor per head, which is 0 at the start, and
    added.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__(heads, key_dim, value_dim, has_local, has_far)
        self.factor = nn.Parameter(torch.empty(heads)) if has_far else None

    def reset_parameters(self) -> None:
        if self.factor is not None:
            nn.init.zeros_(self.factor)

    def define(self, head, q, scores, values, far):
        out = weighted(scores, values)
        return out if far is None else out + self.factor[head].to(q.dtype) * far.out

    def forward(self, q: Tensor, scores: Tensor, local: Tensor, values: Tensor, far: Far | None) -> Tensor:
        out = attend(scores.masked_fill(~local, 0.0), values)
        factor = self.factor
        if far is None or factor is None:
            return out
        return out + factor.to(q.dtype).view(*q.shape[-4:-2], 1, 1) * far.out


class RootMeanSquare(Combine):
    """The sum of both numerators, divided by its root mean square, times a learned gain per head and channel.

    This is the normalisation of RetNet (arXiv 2307.08621 eq. 8) and TransNormer (arXiv 2210.10340 eq. 9). The
    gain starts at 0.1, because a small output disturbs the model less while it is untrained.
    """

    epsilon, start = 1e-6, 0.1

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__(heads, key_dim, value_dim, has_local, has_far)
        self.gain = nn.Parameter(torch.empty(heads, value_dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, self.start)

    def define(self, head, q, scores, values, far):
        out = weighted(scores, values)
        out = out if far is None else out + far.out
        return self.gain[head].to(q.dtype) * out / (out.square().mean() + self.epsilon).sqrt()

    def forward(self, q: Tensor, scores: Tensor, local: Tensor, values: Tensor, far: Far | None) -> Tensor:
        out = attend(scores.masked_fill(~local, 0.0), values)
        return self.normalise(q, out if far is None else out + far.out)

    def normalise(self, q: Tensor, out: Tensor) -> Tensor:
        """Divide `out [..., kv, group, T, Dv]` by its root mean square, times the gain. q gives dtype and
        shape.
        """
        gain = self.gain.to(q.dtype).view(*q.shape[-4:-2], 1, -1)
        return gain * out * (out.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


class Gate(RootMeanSquare):
    """A gated sum of two outputs, with gate g:
    `(1 - g) softmax of the local part + g · gain · linear part / RMS(linear part)`.

    The gate `g = sigmoid(w·q + b)` is learned per head. It is near 0 at the start, and 0 if all tokens are
    local. This combine suits linear parts whose weights may be negative, or which are normalised already.
    """

    start, closed = 1.0, -3.0  # the gain, and the gate's b

    def __init__(self, heads: int, key_dim: int, value_dim: int, has_local: bool, has_far: bool):
        super().__init__(heads, key_dim, value_dim, has_local, has_far)
        self.gate = nn.Parameter(torch.empty(heads, key_dim + 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gate)
        with torch.no_grad():
            self.gate[:, -1] = self.closed

    def define(self, head, q, scores, values, far):
        ceiling = max(scores, default=0.0)
        weights = [(score - ceiling).exp() for score in scores]
        local = weighted(weights, values) / max(sum(weights), TINY)
        if not far.any:
            return local
        weight = self.gate[head].to(q.dtype)
        gate = (weight[:-1] @ q + weight[-1]).sigmoid()
        return (1 - gate) * local + gate * super().define(head, q, [], [far.out], far)

    def forward(self, q: Tensor, scores: Tensor, local: Tensor, values: Tensor, far: Far | None) -> Tensor:
        out = softmax(scores, local, values)
        if far is None:
            return out
        gate = per_head(self.gate, q).sigmoid()
        gate = torch.where(far.any, gate, 0.0)[..., None]  # type: ignore[arg-type]  # a tensor in blocks
        return (1 - gate) * out + gate * self.normalise(q, far.out)


COMBINES = {"shared": Shared, "lolcats": Lolcats, "none": Unnormalised, "rms": RootMeanSquare, "gate": Gate}


def weighted(weights: list, values: list) -> Tensor:
    """Compute Σ weight · value over the local tokens of one query, `[Dv]`.

    Args:
        weights: a scalar tensor for each token.
        values: `[Dv]` for each token. Without tokens, a list of one zero vector.
    """
    return sum((w * v for w, v in zip(weights, values, strict=False)), torch.zeros_like(values[0]))


def attend(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply weights `[..., kv, group, T, N]` and values `[..., kv, N, Dv]`: `[..., kv, group, T, Dv]`.

    The values are not copied for each query head.
    """
    return (weights.flatten(-3, -2) @ values).unflatten(-2, weights.shape[-3:-1])


def by_read_head(x: Tensor, kv: int) -> Tensor:
    """Group query heads by the KV head (or head of S) that they share:
    `[heads, B, X] -> [kv * B, heads / kv, X]`.

    `kv` is the number of shared heads.
    """
    heads, batch, width = x.shape
    if batch == 1:
        return x.view(kv, -1, width)
    return x.view(kv, -1, batch, width).transpose(1, 2).reshape(kv * batch, -1, width)


def as_affine(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return w `[heads, D, 1]` and b `[heads, 1, 1]` of `w·x + b`, views of a parameter `[heads, D + 1]`."""
    return parameter[:, :-1, None], parameter[:, -1:, None]


def per_head(parameter: Tensor, q: Tensor) -> Tensor:
    """Compute `w·q + b` of each head from a parameter `[heads, D + 1]`: `[..., kv, group, T]`."""
    weight = parameter.to(q.dtype).view(*q.shape[-4:-2], 1, -1)
    return (q * weight[..., :-1]).sum(-1) + weight[..., -1]


def softmax(scores: Tensor, local: Tensor, values: Tensor) -> Tensor:
    """Compute the softmax output `[..., kv, group, T, Dv]` of the local tokens alone. Rows without one are
    zero.

    Args:
        scores: `[..., kv, group, T, N]`.
        local: bool, broadcasts to scores, True for local tokens.
        values: `[..., kv, N, Dv]`.
    """
    scores = scores.masked_fill(~local, float("-inf"))
    weights = (scores - finite(scores.detach().amax(-1))[..., None]).exp()
    return attend(weights, values) / positive(weights.sum(-1))


def finite(ceiling: Tensor) -> Tensor:
    """Replace -inf in a tensor of row maxima by 0. A row that sees nothing (a pad) has the maximum -inf."""
    return ceiling.masked_fill(ceiling == float("-inf"), 0.0)


def positive(normaliser: Tensor) -> Tensor:
    """Return a normaliser `[..., T]` as `[..., T, 1]`, raised to at least TINY so that it can be divided by."""
    return normaliser.clamp_min(TINY)[..., None]
