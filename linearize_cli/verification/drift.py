"""How far the state of a layer drifts from what its definition says, by length."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from linearize_cli.runtime.dispatch import converted
from linearize_cli.verification.check import FAIL, OK, Finding, Line, Subject, not_checked

SHORTEST, LONGER = 128, (1, 4, 16)  # tokens, twice the near part where that is longer, and times as many
SINGLE, PIECE = 256, 16  # tokens that come one by one, and at once beyond them
# Of every method, sums in fp32 are 2e-6 off at most; a state that is kept in bf16 is 2e-3 off at least.
LIMIT = 1e-4
LIMITS = {torch.float64: 1e-10}


def drift(subject: Subject) -> Finding:
    """The state of the first layer that has a far part, against sums in fp64."""
    modules = (module.linear_attention for module in converted(subject.model).values())
    attention = next((x for x in modules if x.far is not None and x.equation.causal), None)
    if attention is None:
        return not_checked("drift", "no layer has a far part, so nothing is summed up")
    eq, shortest = attention.equation, SHORTEST
    while shortest < 2 * (eq.sinks + eq.recent):
        shortest *= 2
    lengths = [shortest * times for times in LONGER]
    found = state_errors(attention, *seen_by(attention, subject, lengths[-1]), lengths)
    limit = LIMITS.get(subject.model.dtype, LIMIT)
    worst = max(found, key=lambda row: row["state_rel_error"])
    said = f"{worst['state_rel_error']:.1e} of the state, at {worst['length']:,} tokens"
    verdict = OK if worst["state_rel_error"] <= limit else FAIL
    return Finding({"drift": found}, [Line("drift", said, f"{limit:.1e}", verdict)], {"drift": limit})


def seen_by(attention: nn.Module, subject: Subject, count: int) -> tuple[Tensor, Tensor]:
    """Draw `count` random keys and values `[1, kv, count, D]` from those that the layer receives."""
    seen = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[1:3]))
    try:
        subject.task.read(subject.model, list(subject.rows))
    finally:
        hook.remove()
    k, v = (x.transpose(0, 1).flatten(1, 2) for x in seen[0])  # [kv, B T, D]
    drawn = torch.randint(k.shape[1], (count,), generator=subject.generator()).to(k.device)
    return k[None, :, drawn], v[None, :, drawn]


def state_errors(attention: nn.Module, k: Tensor, v: Tensor, lengths: list[int]) -> list[dict[str, Any]]:
    """Of the layer's cache, `[{length, state_rel_error}]`: the larger of S's and z's."""
    eq, exact = attention.equation, copy.deepcopy(attention.far).double()
    layer = attention.place(DynamicCache(), 0)
    q = k.repeat_interleave(eq.heads // eq.kv_heads, 1)
    empty = attention.empty_state(1, k.device, torch.float64)
    S, z, folded, first, found = empty.S.transpose(0, 1), empty.z.transpose(0, 1), eq.sinks, 0, []
    for length in lengths:
        while first < length:
            part = slice(first, first + (1 if first < SINGLE else PIECE))
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
    """Return the norm of an error as a share of what was expected; 0 if both are zero, as of a pruned layer."""
    size = error.norm()
    return torch.where(size == 0, size, size / expected.norm())
