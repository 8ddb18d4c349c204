"""The constant-size memory of one linear-attention layer."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """All that a layer keeps of its past. The size does not depend on the context.

    The `recent` tokens are the last R of a row, oldest first. They hold the window or group, and the tokens
    under the conv. A token is folded into S and z (added to their sums) when it drops out of `recent`. The
    first tokens of a row, the attention sinks, are never folded. In shapes, leading dimensions (`...`) are
    the batch, `kv` is the number of KV heads, and `far` is the number of KV heads, or of query heads if key
    features are per query head.

    Attributes:
        S: `[..., far, F, Dv]`, Σ φ(k) vᵀ of the folded tokens, in fp32, or in fp64 for fp64 inputs.
        z: `[..., far, F]`, Σ φ(k) of the folded tokens, in the dtype of S.
        sink_k, sink_v: `[..., kv, sinks, D]` and `[..., kv, sinks, Dv]`, in the model's dtype.
        recent_k, recent_v: `[..., kv, R, D]` and `[..., kv, R, Dv]`, in the model's dtype.
        recent_position: `[..., R]` int64, each recent token's position in its row, or -1 in an empty slot.
        count: `[...]` int64, tokens seen so far in each row, without pads.
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
        """Return a state with `function` applied to every tensor. The tensors' first dimension is the batch."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def fork(self) -> "State":
        """Copy the state. The copy shares no memory with it, and every tensor is contiguous."""
        return self.map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def compact(self) -> "State":
        """Return the state with its views of larger tensors copied, so that the larger tensors can be freed."""
        if torch.compiler.is_compiling():  # it has no memory to look at
            return self.fork()
        return self.map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))
