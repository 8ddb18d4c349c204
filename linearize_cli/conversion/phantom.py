"""Meta-device execution: the code of a model runs although its parameters have shapes and no values."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

META = torch.device("meta")


class Phantom(TorchDispatchMode):
    """A torch mode in which an operation on meta and real tensors returns real zeros, and new tensors are
    real.

    Parameters stay on the meta device. Token ids, masks and shapes are real, so the code of a model may
    branch on them (to choose experts, for example).
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
