"""Loading of parameters that accelerate has offloaded to the CPU or to disk."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def offloaded(layer: nn.Module) -> list[nn.Module]:
    """Return the layer and those of its submodules that have offloaded tensors of their own. Empty if none
    has.
    """
    parts = [layer]
    for part in parts:  # this runs for every token, and `modules()` takes ten times as long
        parts += filter(None, part._modules.values())
    hooked = [part for part in parts if "_hf_hook" in part.__dict__]
    return [part for part in hooked if any(x is not None and x.is_meta for x in own_tensors(part))]


def own_tensors(module: nn.Module) -> list:
    """Return a module's own parameters and buffers, without those of its submodules."""
    return [*module._parameters.values(), *module._buffers.values()]


def loaded(layer: nn.Module) -> AbstractContextManager[None]:
    """Load all offloaded tensors of a layer, and keep them on its device while the context is open.

    accelerate loads a module's own tensors when that module is called, and unloads them after the call. The
    equation reads parameters of submodules without calling them. So all submodules are loaded together, and
    calling them unloads nothing.
    """
    parts = offloaded(layer)
    return kept_loaded(parts) if parts else nullcontext()


@contextmanager
def kept_loaded(parts: list[Any]) -> Iterator[None]:
    """Load modules whose weights accelerate has offloaded, and unload them when the context closes.

    Args:
        parts: the modules, each with a hook of accelerate.
    """
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
