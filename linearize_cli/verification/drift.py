"""The check `drift`: how far rounding moves a layer's state from sums in fp64, by sequence length.

The state of the linear part is S, the sum of φ(k) vᵀ, and its normaliser z, the sum of φ(k).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from linearize_cli.runtime.dispatch import converted
from linearize_cli.verification.check import FAIL, OK, Finding, Line, Subject, not_checked
from linearize_cli.verification.definition import layer_inputs

# Lengths are SHORTEST times each of MULTIPLES. SHORTEST is doubled until it covers the local part twice.
SHORTEST, MULTIPLES = 128, (1, 4, 16)
SINGLE, CHUNK = 256, 16  # the first tokens are fed one at a time, later ones in chunks
# For every method, sums in fp32 are off by 2e-6 at most. A state that is kept in bf16 is off by 2e-3 at least.
LIMIT = 1e-4
LIMITS = {torch.float64: 1e-10}


def drift(subject: Subject) -> Finding:
    """Measure the rounding error of the running sums S and z of one layer, against the same sums in fp64.

    It is the first causal layer that has a linear part.
    """
    modules = (module.linear_attention for module in converted(subject.model).values())
    attention = next((x for x in modules if x.far is not None and x.equation.causal), None)
    if attention is None:
        return not_checked("drift", "no layer has a global (linear) part, so there is no state to sum")
    eq, shortest = attention.equation, SHORTEST
    while shortest < 2 * (eq.sinks + eq.recent):
        shortest *= 2
    lengths = [shortest * times for times in MULTIPLES]
    found = state_errors(attention, *sampled_inputs(attention, subject, lengths[-1]), lengths)
    limit = LIMITS.get(subject.model.dtype, LIMIT)
    worst = max(found, key=lambda row: row["state_rel_error"])
    said = f"relative error of the state {worst['state_rel_error']:.1e}, at {worst['length']:,} tokens"
    verdict = OK if worst["state_rel_error"] <= limit else FAIL
    return Finding({"drift": found}, [Line("drift", said, f"{limit:.1e}", verdict)], {"drift": limit})


def sampled_inputs(attention: nn.Module, subject: Subject, count: int) -> tuple[Tensor, Tensor]:
    """Sample `count` keys and values, `[1, kv, count, D]` for kv KV heads, from those that the layer
    receives.
    """
    _, k, v = layer_inputs(subject, attention)
    sampled = torch.randint(k.shape[-2], (count,), generator=subject.generator()).to(k.device)
    return k[..., sampled, :], v[..., sampled, :]


def state_errors(attention: nn.Module, k: Tensor, v: Tensor, lengths: list[int]) -> list[dict[str, Any]]:
    """Feed keys and values to a layer's cache, and return the error of its state at each length.

    Args:
        k, v: `[1, kv, T, D]`.
        lengths: the numbers of tokens at which the state is compared, in increasing order.

    Returns:
        `[{length, state_rel_error}]`. The error is the larger of the relative errors of S and of z.
    """
    eq, exact = attention.equation, copy.deepcopy(attention.far).double()
    layer = attention.place(DynamicCache(), 0)
    q = k.repeat_interleave(eq.heads // eq.kv_heads, 1)
    empty = attention.empty_state(1, k.device, torch.float64)
    S, z, folded, first, found = empty.S.transpose(0, 1), empty.z.transpose(0, 1), eq.sinks, 0, []
    for length in lengths:
        while first < length:
            part = slice(first, first + (1 if first < SINGLE else CHUNK))
            layer.attend(attention, *(x[..., part, :] for x in (q, k, v)), None, None)
            first = part.stop
        for position in range(folded, length - eq.recent):
            token = (x[:1, :, position].double().transpose(0, 1) for x in (k, v))
            exact.fold_one(S, z, *token, [position])
        folded = length - eq.recent
        pairs = (layer.state.S[0], S[:, 0]), (layer.state.z[0], z[:, 0])
        error = torch.stack([relative(x.double() - y, y) for x, y in pairs]).max()
        found.append({"length": length, "state_rel_error": error.nan_to_num(nan=1.0, posinf=1.0).item()})
    return found


def relative(error: Tensor, expected: Tensor) -> Tensor:
    """Return the norm of an error divided by the norm of the expected tensor.

    It is 0 if the error is 0, also where the expected tensor is zero (a pruned layer).
    """
    size = error.norm()
    return torch.where(size == 0, size, size / expected.norm())
