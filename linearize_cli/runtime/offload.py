"""Parameters that accelerate keeps on the CPU or on disk, and loads for the time of a forward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn


def offloaded(layer: nn.Module) -> list[nn.Module]:
    """Return the parts of a layer whose own tensors accelerate has unloaded."""
    parts = [layer]
    for part in parts:  # as `modules()`, in a tenth of its time: this runs for every token
        parts += filter(None, part._modules.values())
    hooked = [part for part in parts if "_hf_hook" in part.__dict__]
    return [part for part in hooked if any(x is not None and x.is_meta for x in own_tensors(part))]


def own_tensors(module: nn.Module) -> list:
    return [*module._parameters.values(), *module._buffers.values()]


def loaded(layer: nn.Module) -> AbstractContextManager[None]:
    """Keep the tensors of all parts of a layer on its device until the block ends.

    accelerate loads a module's own tensors when that module is called, and unloads them after the call. The equation
    reads parameters of its parts without calling them. So the parts are loaded together, and calls of them unload
    nothing.
    """
    parts = offloaded(layer)
    return kept_loaded(parts) if parts else nullcontext()


@contextmanager
def kept_loaded(parts: list[nn.Module]) -> Iterator[None]:
    """Load the parts of a layer, and unload them when the block ends."""
    calls = [part.forward for part in parts]
    for part in parts:
        part._hf_hook.pre_forward(part)
        part.forward = part._old_forward
    try:
        yield
    finally:
        for part, call in zip(parts, calls, strict=True):
            part.forward = call
            part._hf_hook.post_forward(part, None)
