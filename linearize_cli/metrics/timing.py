"""Seconds and bytes of what is run, and the machine that they belong to."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import profiler_legacy
from torch.profiler import record_function

RUN = "the run whose memory is measured"

Run = Callable[[], object]
Prepared = TypeVar("Prepared")


def interleaved(
    ways: Mapping[str, Run], device: torch.device | str, repeats: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of each way, all of them one after the other in every repeat, so that they meet the same machine.

    Args:
        device: where they run; it has finished before a clock is read.
        repeats: at most, and at least one; no more begins once `budget` seconds are over.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begun > budget:
            break
        for name, run in ways.items():
            finish(device)
            started = time.perf_counter()
            run()
            finish(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def finish(device: torch.device | str) -> None:
    """Wait for what the device was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(
    prepare: Callable[[], Prepared], run: Callable[[Prepared], object], device: torch.device | str
) -> tuple[Prepared, int | None]:
    """What `prepare` returns, and the most bytes that tensors take while `run` works on it, beyond what they took
    before; None: the device's allocator does not tell.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return cpu_peak_bytes(prepare, run)
    prepared, peak = prepare(), None
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    run(prepared)
    if kind == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    return prepared, peak


def cpu_peak_bytes(
    prepare: Callable[[], Prepared], run: Callable[[Prepared], object]
) -> tuple[Prepared, int]:
    """As `peak_bytes`, from the allocator's events: it knows only what was allocated since it is watched."""
    # The profiler that torch.profiler replaced is the one that prints nothing.
    torch.autograd._enable_profiler_legacy(profiler_legacy.profile(profile_memory=True).config())
    try:
        prepared = prepare()
        with record_function(RUN):
            run(prepared)
    finally:
        threads = torch.autograd._disable_profiler_legacy()
    now = peak = 0
    for event in (event for thread in threads for event in thread):
        if event.kind() == "memory_alloc":
            now += event.cpu_memory_usage()
            peak = max(peak, now)
        elif event.kind() == "push" and event.name() == RUN:
            now = peak = 0
    return prepared, peak


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left, on a GPU or not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine(device: torch.device | str) -> dict[str, Any]:
    """What a speed depends on: the CPU's model, its cores and the threads that torch uses, and the GPU's name."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def cpu() -> str:
    """The CPU's model, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
