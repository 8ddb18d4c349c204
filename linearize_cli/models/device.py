"""The device and the dtype of a computation, and the memory that a device has free.

torch is imported inside the functions, so that `linearize --help` starts fast.
"""

from __future__ import annotations

import time
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from linearize_cli.errors import Notice, UserError
from linearize_cli.hub import brief

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AUTO = "auto"
SLOWER = 2.0  # half precision is not used on a CPU whose half-precision products take this many times longer
CGROUP = Path("/sys/fs/cgroup")  # the memory limit of a container (Linux)


def chosen_device(device: str = AUTO) -> str:
    """Return the name of the torch device to use. `auto` is CUDA if there is one, then MPS, then the CPU.

    Raises:
        UserError: the device does not exist or cannot be used.
    """
    import torch

    if device == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found is not None and found.type in ("cuda", "mps") else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("tensors on the meta device hold no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        hint = "Pass --device cpu. --dry-run plans for a device that is not here."
        raise UserError(f"The device `{device}` cannot be used: {brief(error)}", hint) from error
    return device


def is_here(device: str) -> bool:
    """Return True if torch can use a device on this machine."""
    try:
        chosen_device(device)
    except UserError:
        return False
    return True


def checked_dtype(dtype: str | None) -> torch.dtype | None:
    """Return the torch dtype with this name, or None for None and `auto`.

    Raises:
        UserError: the name is not that of a floating-point dtype.
    """
    import torch

    if dtype in (None, AUTO):
        return None
    found = getattr(torch, dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(f"`{dtype}` is not a floating-point dtype.", "Use float32, bfloat16 or float16.")
    return found


def working_dtype(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the dtype to compute in for weights of a dtype: fp32 if the device is a CPU that is slow in half
    precision, else the dtype of the weights.
    """
    import torch

    half = dtype in (torch.bfloat16, torch.float16)
    slow = half and torch.device(device).type == "cpu" and slowdown(dtype) > SLOWER
    return torch.float32 if slow else dtype


def in_working_dtype(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Return a model in the dtype to compute in on a device (see `working_dtype`). Say so if it changes."""
    stored = model.dtype
    wanted = working_dtype(stored, device)
    if wanted == stored:
        return model
    name = str(stored).removeprefix("torch.")
    warnings.warn(
        f"computing in float32, because {name} is {slowdown(stored):.0f} times slower on this CPU. Pass "
        f"--dtype {name} to use it all the same.",
        Notice,
        stacklevel=2,
    )
    return model.to(wanted)


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Return how many times longer than in fp32 a matrix product takes on the CPU in a dtype.

    It is measured once per process, in some milliseconds: the best of 3 products each.
    """
    import torch

    def seconds(kind: torch.dtype) -> float:
        x, weight = torch.ones(64, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            x @ weight
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(dtype) / seconds(torch.float32)


def free_memory(device: str) -> int:
    """Return the free bytes of a device. Of a CPU it is the memory that the system and the container can
    still give.
    """
    import psutil
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - int(counts["anon"]))  # pages of files can be dropped
    except (OSError, ValueError, KeyError):  # no container, or no limit ("max")
        pass
    return free
