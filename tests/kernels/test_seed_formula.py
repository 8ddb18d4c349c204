"""`augmented:flash` against the seed's formula (arXiv 2406.07368), written out densely in fp64."""

import pytest
import torch
from linearize_kernels import LinearAttention, chunked

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation

HEADS, DIM = 3, 8
GEOMETRY = dict(heads=HEADS, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, scale=0.3, softcap=None)


def paper(q, k, v, factor, taps, group):
    """Squared ReLU within groups, linear attention to earlier groups, and the masked depthwise conv."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        start = t // group * group
        own = torch.einsum("hd,hsd->hs", q[:, t], k[:, start : t + 1]).clamp_min(0) ** 2
        out[:, t] += torch.einsum("hs,hsd->hd", own, v[:, start : t + 1])
        kv = torch.einsum("hsd,hse->hde", k[:, :start], v[:, :start])
        out[:, t] += factor[:, None] * torch.einsum("hd,hde->he", q[:, t], kv)
        for delay in range(min(taps.shape[1], t + 1)):
            out[:, t] += taps[:, delay, None] * v[:, t - delay]
    return out


@pytest.mark.parametrize("length", [1, 5, 30, 63, 64, 65, 127, 128, 129, 192, 200])
def test_all_forms_equal_the_paper_s(length):
    torch.manual_seed(length)
    recipe = load_recipe("augmented:flash").to_dict()["attention"]
    attention = LinearAttention(equation(recipe, GEOMETRY)).double()
    assert (attention.equation.size, attention.conv.shape[1]) == (64, 32)
    assert not attention.conv.any() and not attention.combine.factor.any(), "both start at zero"
    torch.nn.init.normal_(attention.conv)
    torch.nn.init.normal_(attention.combine.factor)
    # Keys with a mean: sums over random keys alone would hide a forgotten group.
    q, k, v = (torch.randn(1, HEADS, length, DIM, dtype=torch.float64) + 0.5 for _ in range(3))
    expected = paper(q[0], k[0], v[0], attention.combine.factor, attention.conv, 64)
    for chunk in (16, 64, 100):
        torch.testing.assert_close(chunked(attention, None, q, k, v, chunk=chunk)[0][0], expected)
    state, outputs = None, []
    for t in range(length):
        out, state = chunked(attention, state, *(x[..., t : t + 1, :] for x in (q, k, v)))
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2)[0], expected)
