"""The memories of the state: a value that is stored under a key comes back."""

import pytest
import torch
from linearize_kernels import chunked
from papers import DIM, HEADS, SCALE, VALUE_DIM, layer, tokens


def lossless(name):
    """A memory that does not forget and is not normalised; the delta rule at full strength."""
    attention = layer(name, "attention.combine=none", kv_heads=2)
    constants = dict(decay_bias=-1e6, decay_weight=0.0, strength_bias=1e6, strength_weight=0.0, factor=1.0)
    for parameter_name, parameter in attention.named_parameters():
        torch.nn.init.constant_(parameter, constants[parameter_name.split(".")[-1]])
    return attention


def orthonormal(heads):
    return torch.linalg.qr(torch.randn(heads, DIM, DIM, dtype=torch.float64))[0]


def read(attention, q, k, v):
    """Chunks and single tokens, which must agree: `[H, T, Dv]`."""
    out = chunked(attention, None, q, k, v, chunk=5)[0]
    state, outputs = None, []
    for t in range(q.shape[2]):
        token, state = chunked(attention, state, *(x[:, :, t : t + 1] for x in (q, k, v)))
        outputs.append(token)
    torch.testing.assert_close(torch.cat(outputs, 2), out)
    return out[0]


@pytest.mark.parametrize("name", ["retention", "mamba2", "gla", "gated-delta", "kda"])
def test_a_memory_that_does_not_forget_returns_every_value(name):
    torch.manual_seed(0)
    keys, values = orthonormal(2), torch.randn(2, DIM, VALUE_DIM, dtype=torch.float64)
    asked = torch.tensor(
        [0, 0, 2, 1, 4, 0, 3, 6]
    )  # token t asks for what token asked[t] stored, itself included
    unscaled = 1 if name in ("gated-delta", "kda") else 1 / SCALE
    q = unscaled * keys[:, asked].repeat_interleave(HEADS // 2, 0)
    out = read(lossless(name), q[None], keys[None], values[None])
    torch.testing.assert_close(out, values[:, asked].repeat_interleave(HEADS // 2, 0))


def test_the_delta_rule_overwrites_and_a_sum_adds_up():
    torch.manual_seed(0)
    keys = orthonormal(2).repeat(1, 3, 1)
    values = torch.randn(2, 3 * DIM, VALUE_DIM, dtype=torch.float64)
    asked = torch.arange(3 * DIM) - 2  # the key of two tokens before, written up to three times by then
    q, latest, total = torch.zeros_like(keys), torch.zeros_like(values), torch.zeros_like(values)
    for t in range(2, 3 * DIM):
        q[:, t] = keys[:, asked[t]]
        latest[:, t] = values[:, asked[t]]
        total[:, t] = values[:, asked[t] % DIM : asked[t] + 1 : DIM].sum(1)
    q, latest, total = (x.repeat_interleave(HEADS // 2, 0) for x in (q, latest, total))
    torch.testing.assert_close(read(lossless("gated-delta"), q[None], keys[None], values[None]), latest)
    torch.testing.assert_close(read(lossless("retention"), q[None] / SCALE, keys[None], values[None]), total)


def test_the_delta_rule_at_full_strength_answers_any_key_with_its_latest_value():
    torch.manual_seed(0)
    q, k, v = tokens(130, 2)
    out = read(lossless("gated-delta"), k.repeat_interleave(HEADS // 2, 1), k, v)
    torch.testing.assert_close(out, v[0].repeat_interleave(HEADS // 2, 0))
