"""The cache layer of a converted layer: one state of constant size, with rollback."""

from collections.abc import Callable

import torch
from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.backend import decoding_backend
from linearize_kernels.ops.chunked import chunked, commit
from linearize_kernels.ops.decode import Decoding
from linearize_kernels.remembered import forget_derived
from linearize_kernels.state import State
from linearize_kernels.triton.nodes import decode_one_token, why_not
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from linearize_cli.runtime.offload import loaded

# Most tokens that a crop can take back. Their keys and values are kept while the cache records its past.
ROLLBACK = 256


class MappedRows:
    """Operations on the rows of a cache layer."""

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor of the layer, batch dimension first."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x[indices.to(x.device)])


class LinearCacheLayer(MappedRows, LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """A cache layer that holds a `State` instead of keys and values.

    `update` returns the new keys and values unchanged. The attention module passes them to `attend`. While the past is
    recorded, the layer keeps the state of the last crop and the tokens since then. A crop replays the tokens that
    remain.

    Attributes:
        decoding: the state as it is laid out while tokens are decoded one by one, or None.
        last_state: the state, or None if there is none yet or only `decoding` is up to date.
        seen: tokens appended to each row, pads included, as transformers counts cache positions.
    """

    decoding: Decoding | None
    last_state: State | None
    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, record_past: bool = False):
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        self.record_past = record_past
        self.reset()

    def reset(self) -> None:
        self.state: State | None = None
        self.seen = 0
        self.has_previous_state = {0: False}
        self.is_initialized = False
        self.keys = self.values = torch.empty(0)  # some models ask any layer for the size of its keys
        self.attention: LinearAttention | None = None
        self.owned = False  # whether nothing else holds the state's tensors, so that they may be written to
        self.forget()

    def forget(self) -> None:
        """Delete the record of the past: no crop goes back beyond this point."""
        self.snapshot: State | None = None
        self.trail: tuple[Tensor, ...] | None = None  # k, v and which tokens are no pads

    def attend(
        self,
        attention: LinearAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Append new tokens to the state, and return their outputs `[B, heads, T, Dv]`; arguments as of `chunked`."""
        if q.shape[-2] == 1 and valid is None:
            written = self.state_to_write(attention, q, sink_logits)
            if written is not None:
                out = decode_one_token(attention, written, q, k, v)
                self.seen += 1
                return out
            if self.decodes(attention, q):
                return self.decode(attention, q, k, v, sink_logits)
        out, state = chunked(attention, self.state, q, k, v, valid, sink_logits)
        self.append(attention, state, k, v, valid)
        return out

    def decodes(self, attention: LinearAttention, q: Tensor) -> bool:
        """Return whether `Decoding` computes the next token: on a CPU, without gradients, and not in compiled code."""
        if self.decoding is None and self.last_state is None:
            return False
        return decoding_backend(attention, q) == "torch"

    def decode(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None
    ) -> Tensor:
        """Append one token of every row to the state, and return the outputs `[B, heads, 1, Dv]`."""
        if self.record_past:
            self.record(attention, k, v, None)
        decoding = self.decoding
        if decoding is None:
            decoding = self.begin_decoding(attention)
        if attention.ran != "block":  # to set a module's attribute takes as long as two operations
            attention.ran = "block"
        self.last_state, self.seen = None, self.seen + 1
        return decoding.decode_one_token(attention, q, k, v, sink_logits).to(q.dtype)

    def begin_decoding(self, attention: LinearAttention) -> Decoding:
        """Lay out the state to decode tokens one by one."""
        assert self.last_state is not None  # `decodes` has seen it
        forget_derived(attention)
        self.decoding = Decoding(attention.equation, self.last_state)
        return self.decoding

    @property
    def state(self) -> State | None:
        """Return the state after all tokens, or None before the first. Later tokens do not write into it on a CPU."""
        if self.last_state is None and self.decoding is not None:
            self.last_state = self.decoding.state()
        return self.last_state

    @state.setter
    def state(self, state: State | None) -> None:
        self.last_state, self.decoding = state, None

    def state_to_write(
        self, attention: LinearAttention, q: Tensor, sink_logits: Tensor | None
    ) -> State | None:
        """Return the state if Triton's kernels compute the tokens of q and write into it, or else None.

        A state that something else may hold is copied first, once.
        """
        wanted = decoding_backend(attention, q) == "triton"
        if not wanted or self.record_past or sink_logits is not None:
            return None
        state = self.state
        if state is None:
            return None
        if not self.owned:
            state = state.fork()
            self.state, self.owned = state, True
        if why_not(attention, state, q) is not None:
            return None
        attention.ran = "triton"
        return state

    def append(
        self, attention: LinearAttention, state: State, k: Tensor, v: Tensor, valid: Tensor | None
    ) -> None:
        """Replace the state by the one after the tokens k, v `[B, kv, T, D]`; valid `[B, T]` or None."""
        if self.record_past:
            self.record(attention, k, v, valid)
        self.state, self.owned = state.compact(), False
        self.seen += k.shape[-2]
        self.begin()

    def begin(self) -> None:
        """Mark the layer as not empty."""
        self.has_previous_state[0] = self.is_initialized = True

    def record(self, attention: LinearAttention, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        valid = (
            torch.ones(k.shape[0], k.shape[-2], dtype=torch.bool, device=k.device) if valid is None else valid
        )
        self.attention = attention
        if self.trail is None:
            self.snapshot = self.state or attention.empty_state(k.shape[0], k.device, k.dtype)
            self.trail = (k, v, valid)
        else:
            old_k, old_v, old_valid = self.trail
            self.trail = (
                torch.cat([old_k, k], -2),
                torch.cat([old_v, v], -2),
                torch.cat([old_valid, valid], -1),
            )
        excess = self.trail[0].shape[-2] - ROLLBACK
        if excess > 0:
            self.snapshot = self.replay(attention, excess)
            k, v, valid = self.trail
            self.trail = k[..., excess:, :], v[..., excess:, :], valid[:, excess:]

    def replay(self, attention: LinearAttention | None, length: int) -> State:
        """Return the snapshot after the first `length` tokens of the trail."""
        if attention is None or self.snapshot is None or self.trail is None:
            raise RuntimeError("the cache has recorded no tokens")
        if length == 0:
            return self.snapshot
        k, v, valid = self.trail
        valid = valid[:, :length]
        with torch.no_grad(), loaded(attention):
            return commit(
                attention,
                self.snapshot,
                k[..., :length, :],
                v[..., :length, :],
                None if bool(valid.all()) else valid,
            ).fork()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            RuntimeError: the layer was not recording, or fewer tokens were recorded.
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "a linear-attention state is cropped by a negative number: the tokens to take back"
            )
        if tokens_to_remove < 0:
            kept = -1 if self.trail is None else self.trail[0].shape[-2] + tokens_to_remove
            if kept < 0:
                raise RuntimeError(
                    f"cannot take back {-tokens_to_remove} tokens: call activate_past_recording() on the "
                    "cache after its first tokens and before these, and take back none from before the last "
                    f"crop and at most {ROLLBACK}"
                )
            self.state, self.owned = self.replay(self.attention, kept), False
            self.seen += tokens_to_remove
        self.forget()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def nbytes(self) -> int:
        """Return the bytes of the state; 0 before the first token."""
        return 0 if self.state is None else self.state.nbytes()

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state, self.owned = self.state.map(function), False
        if self.snapshot is not None and self.trail is not None:
            self.snapshot = self.snapshot.map(function)
            self.trail = tuple(function(x) for x in self.trail)

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def lazy_initialization(self, *args, **kwargs) -> None: ...

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        raise NotImplementedError("a converted attention layer has no conv state of a Mamba kind")

    update_recurrent_state = update_conv_state


class HybridCacheLayer(LinearCacheLayer):
    """A cache layer with a `State` and the native conv and recurrent states of a layer that attends and recurs in
    parallel (Falcon-H1, Zamba2). The native states are moved here from the cache's own layer. A recurrent state cannot
    take tokens back.
    """

    is_compileable = False
    is_croppable = LinearAttentionCacheLayerMixin.is_croppable
    update_conv_state = LinearAttentionLayer.update_conv_state
    update_recurrent_state = LinearAttentionLayer.update_recurrent_state
    lazy_initialization = LinearAttentionLayer.lazy_initialization

    def __init__(self, native: LinearAttentionLayer):
        super().__init__(native.record_past)
        for name in vars(LinearAttentionLayer(native.number_of_states)):
            setattr(self, name, getattr(native, name))

    def reset(self) -> None:
        super().reset()
        LinearAttentionLayer.reset(self)

    def begin(self) -> None:
        self.is_initialized = True  # has_previous_state is that of the native states

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and not self.is_croppable:
            raise RuntimeError("the layer's own recurrent state cannot take tokens back")
        super().crop(tokens_to_remove)
        if self.record_past:
            LinearAttentionLayer.crop(self, tokens_to_remove)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map(function)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: function(x) for i, x in states.items() if x is not None})
