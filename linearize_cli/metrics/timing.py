"""Run time, peak memory, and the description of the machine."""

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

RUN = "the run whose memory is measured"  # its name among the profiler's events

Run = Callable[[], object]
Prepared = TypeVar("Prepared")


def interleaved(
    ways: Mapping[str, Run], device: torch.device | str, repeats: int, budget: float
) -> dict[str, list[float]]:
    """Time several functions in turn, so that changes of the machine's speed affect all of them alike.

    Args:
        ways: the functions by name.
        device: the device that they run on. It is synchronised before each reading of the clock.
        repeats: the largest number of repeats. Each runs every function once.
        budget: seconds after which no further repeat begins. The first repeat always runs.

    Returns:
        The seconds of each repeat, by name.
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
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(
    prepare: Callable[[], Prepared], run: Callable[[Prepared], object], device: torch.device | str
) -> tuple[Prepared, int | None]:
    """Measure the peak memory of tensors during a run.

    Args:
        prepare: makes the argument of `run`.
        run: the function to measure.
        device: the device that it runs on.

    Returns:
        The result of `prepare`, and the peak bytes allocated during `run` beyond those allocated before it. The
        bytes are None on devices other than CPU and CUDA.
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
    """Measure the peak memory of a run on the CPU from the allocator's events.

    Returns:
        The result of `prepare`, and the peak bytes allocated during `run` beyond those allocated before it.
    """
    # torch.profiler would print to the terminal, and this older profiler does not.
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
    """Return True if an error means that memory ran out, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU thread while the context is open."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine(device: torch.device | str) -> dict[str, Any]:
    """Return the CPU's name, the number of cores, the threads that torch uses, and the GPU's name or None."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"cpu": cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def cpu() -> str:
    """Return the CPU's model name, or its architecture if the system does not report one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
