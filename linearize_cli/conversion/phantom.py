"""A model without weights: its parameters are on the meta device, and its code runs all the same, so that what a
forward costs can be counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

META = torch.device("meta")


class Phantom(TorchDispatchMode):
    """While open, what is computed from a meta tensor and a real one is zeros in memory; what is made new is real.

    So token ids, masks and shapes are real and a model's code may branch on them (a choice of experts, say),
    though its weights are on the meta device, where nothing has a value.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        if META not in devices:
            if kwargs.get("device") == META:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)
        wanted = kwargs.get("device")
        if devices == {META} and (wanted is None or wanted == META):
            return func(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = META
        result = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(_to_zeros, result)


def _to_meta(x: Any) -> Any:
    return torch.empty_like(x, device=META) if isinstance(x, Tensor) and x.device != META else x


def _to_zeros(x: Any) -> Any:
    return torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x


@contextmanager
def shortened(layers: Sequence[nn.Module], kept: Sequence[int], returns: list[int]) -> Iterator[None]:
    """While open, only some of the layers run; the others pass their hidden states on.

    Args:
        returns: how long a tuple each layer returns, 0 for a plain tensor.
    """
    skipped = [i for i in range(len(layers)) if i not in kept]

    def forward_of(length: int):
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (length - 1)) if length else hidden

        return forward

    for i in skipped:
        layers[i].forward = forward_of(returns[i])
    try:
        yield
    finally:
        for i in skipped:
            del layers[i].forward


@contextmanager
def watched(layers: Sequence[nn.Module], forward: Callable[[int, Any], None]) -> Iterator[None]:
    """While open, `forward` is called with each layer's index and what it returned."""
    hooks = [
        layer.register_forward_hook(lambda module, args, output, i=i: forward(i, output))
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def learning_inputs(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While open, the hidden states that reach these layers need a gradient, as they do behind a layer that learns."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def saved_bytes(layers: Sequence[nn.Module]) -> Iterator[dict[int | None, int]]:
    """While open, counts the bytes that autograd keeps for a backward pass, but parameters on the meta device: by
    the layer whose forward keeps them, None elsewhere. They are only counted: no backward can follow.
    """
    counted: dict[int | None, int] = dict.fromkeys([*range(len(layers)), None], 0)
    inside: list[int | None] = [None]
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> None:
        storage = x.untyped_storage()
        if x.device != META and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its address
            counted[inside[-1]] += storage.nbytes()

    def refuse(_: None) -> Tensor:
        raise RuntimeError("what autograd keeps was only counted")

    def leave(index: int, output: Any) -> None:
        inside.pop()
        kept.clear()

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, i=i: inside.append(i))
        for i, layer in enumerate(layers)
    ]
    try:
        with watched(layers, leave), torch.autograd.graph.saved_tensors_hooks(pack, refuse):
            yield counted
    finally:
        for hook in hooks:
            hook.remove()
