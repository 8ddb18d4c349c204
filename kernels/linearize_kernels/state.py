"""The constant-size memory of one linear-attention layer."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """All that a layer keeps of its past, of fixed size whatever the context.

    The `recent` tokens are the last R of a row, oldest first: the near part and the conv's tail both lie
    within them. A token is folded into S and z when it drops out of `recent`; the first tokens of a row (the
    sinks) never are. Leading dimensions (`...`) are the batch; `kv` is KV heads; `far` is KV heads, or query
    heads where key features are per query head.

    Attributes:
        S: `[..., far, F, Dv]` Σ φ(k) vᵀ of the folded tokens; fp32, or fp64 for fp64 inputs.
        z: `[..., far, F]` Σ φ(k) of the folded tokens; dtype of S.
        sink_k, sink_v: `[..., kv, sinks, D]`, dtype of the model.
        recent_k, recent_v: `[..., kv, R, D]`, dtype of the model.
        recent_position: `[..., R]` int64, each recent token's position in its row; -1: an empty slot.
        count: `[...]` int64, tokens seen so far in each row, pads not counted.
    """

    S: Tensor
    z: Tensor
    sink_k: Tensor
    sink_v: Tensor
    recent_k: Tensor
    recent_v: Tensor
    recent_position: Tensor
    count: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """A new state with `function` applied to every tensor (batch dimension first)."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def fork(self) -> "State":
        """A copy that shares no memory, every tensor contiguous."""
        return self.map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def compact(self) -> "State":
        """The same numbers, where no tensor keeps the memory of a larger one."""
        if torch.compiler.is_compiling():  # it has no memory to look at
            return self.fork()
        return self.map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))
