"""Triton's kernels are tried once, on a few tokens, before `auto` uses them.

They may not compile or start on a machine: without a C compiler, with too little shared memory, or on another vendor's
GPU, a kernel raises an error of one of many kinds. `auto` then computes in torch, and says so once.
"""

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention

# By layer: why each kind of kernels cannot run, or None if it can.
_found: WeakKeyDictionary[LinearAttention, dict[tuple, str | None]] = WeakKeyDictionary()
_said: set[str] = set()


def failure(
    attention: LinearAttention, q: Tensor, kind: str, length: int, run: Callable[..., Tensor]
) -> str | None:
    """Return why a layer's kernels cannot run, or None if they can. They run once for each layer, device, dtype and
    kind, and the answer is kept. The first failure of a kind is a warning, too.

    Args:
        attention: the layer's parameters.
        q: queries, of which the dtype and the device are used.
        kind: what the kernels compute, for the warning.
        length: tokens of the trial.
        run: computes outputs from q `[1, heads, length, D]`, k `[1, kv, length, D]` and v `[1, kv, length, Dv]`. With
            gradients enabled, the backward runs too.
    """
    key = (kind, q.dtype, q.device, torch.is_grad_enabled())
    found = _found.setdefault(attention, {})
    if key not in found:
        found[key] = attempt(attention, q, length, run)
        reason = found[key]
        if reason is not None and kind not in _said:
            _said.add(kind)
            warnings.warn(
                f"Triton's kernels for {kind} do not run on {q.device}, so torch computes instead, which is slower: "
                f"{reason}",
                stacklevel=2,
            )
    return found[key]


def attempt(attention: LinearAttention, q: Tensor, length: int, run: Callable[..., Tensor]) -> str | None:
    """Run kernels on `length` tokens (see `failure`). Return the error, or None if there was none."""
    eq = attention.equation
    widths = (eq.heads, eq.key_dim), (eq.kv_heads, eq.key_dim), (eq.kv_heads, eq.value_dim)
    options: dict[str, Any] = dict(dtype=q.dtype, device=q.device, requires_grad=torch.is_grad_enabled())
    heads = [torch.full((1, count, length, width), 0.1, **options) for count, width in widths]
    ran = attention.ran
    try:
        out = run(*heads)
        if torch.is_grad_enabled():
            torch.autograd.grad(out.float().sum(), heads, allow_unused=True)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)  # an error of a kernel that has started is raised here
    except Exception as error:  # Triton, its compilers and the driver raise errors of many kinds
        first_line = next(iter(str(error).strip().splitlines()), "no message")
        return f"{type(error).__name__}: {first_line}"
    finally:
        attention.ran = ran
    return None
