"""The group form in torch (arXiv 2406.07368): squared ReLU within a group, linear attention to all groups
before.

The chunks are the groups. Every group reads its own keys and values, and S of all groups before it. The conv
also reads the last values of the group before.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.torch_forms.chunks import Tiling, band, by_chunk, by_head, columns, sums_outside


class Groups(NamedTuple):
    """The inputs of squared ReLU in groups with linear attention to earlier groups: n whole groups of C
    tokens.

    N is batch x heads of S, and g is the number of query heads that read one head of S. Slots without a token
    are zero.

    Attributes:
        q, k: `[N, g, n C, D]` and `[N, n C, D]`, at unit norm.
        v: `[N, R + n C, Dv]`. The first R slots hold older values, which only the conv reads.
        phi_q, phi_k: `[N, g, n C, F]` and `[N, n C, F]`, the features of queries and keys, or None without a
            linear part.
        factor: `[N, g]`, the factor of the linear part, or None without a linear part.
        conv: the conv's weights `[N, g, W]`, or None.
        S: `[N, F, Dv]`, the state before the first group. Triton takes None for packed sequences, where it is
            zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    factor: Tensor | None
    conv: Tensor | None
    S: Tensor


def grouped(shape: Tiling, folds: int, tokens: Groups) -> tuple[Tensor, Tensor]:
    """Compute squared ReLU within groups of C tokens, plus linear attention to all earlier groups.

    Args:
        shape: the sizes C and R.
        folds: the number of groups to add to the returned S.
        tokens: the inputs.

    Returns:
        The outputs `[N, g, n C, Dv]`, and S after the first `folds` groups, `[N, F, Dv]`. Without a linear
        part, S is the given one.
    """
    C, R = shape.chunk, shape.recent
    q, k = by_chunk(tokens.q, C), tokens.k.unflatten(1, (-1, C))
    scores = (q @ k.mT).unflatten(2, (-1, C)).tril().flatten(2, 3)
    weights = scores.relu().square()
    if tokens.conv is not None:
        weights = pad(weights, (R, 0)) + band(tokens.conv, shape)
    out = weights @ columns(tokens.v, shape)
    if tokens.phi_q is None or tokens.phi_k is None or tokens.factor is None:
        return by_head(out, C), tokens.S
    phi_q, phi_k = by_chunk(tokens.phi_q, C), tokens.phi_k.unflatten(1, (-1, C))
    sums = (phi_k.mT @ tokens.v[:, R:].unflatten(1, (-1, C))).flatten(2)
    S, _ = sums_outside(tokens.S.flatten(1), sums, Tiling(C, R), phi_q.shape[1])
    factor = tokens.factor.repeat_interleave(C, 1)[:, None, :, None]
    out = out + factor * (phi_q @ S.unflatten(2, tokens.S.shape[1:]))
    return by_head(out, C), tokens.S + sums[:, :folds].sum(1).view_as(tokens.S)
