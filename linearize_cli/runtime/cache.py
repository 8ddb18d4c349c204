"""The cache layer of a converted layer: one state of constant size, from which the last tokens can be
removed.
"""

from collections.abc import Callable

import torch
from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.backend import decoding_backend
from linearize_kernels.ops.chunked import chunked, commit
from linearize_kernels.ops.decode import Decoding
from linearize_kernels.remembered import forget_derived
from linearize_kernels.state import State
from linearize_kernels.triton.nodes import decode_one_token, trial, why_not
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
    """The operations that transformers runs on the batch of a cache layer (reorder, repeat, select), built on
    `map`.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the layer by the function's result for it. The tensors' first dimension is
        the batch.
        """
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x[indices.to(x.device)])


class LinearCacheLayer(MappedRows, LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """A cache layer that holds a `State` instead of keys and values.

    `update`, which transformers calls, returns the new keys and values unchanged. The attention module then
    passes them to `attend`, which appends them to the state.

    With `record_past`, the layer also keeps an older state (the snapshot) and the keys and values of the
    tokens since then (the trail, at most ROLLBACK tokens). A crop computes the state again from the snapshot
    and the tokens that remain.

    Attributes:
        record_past: True if the layer keeps what a crop needs.
        decoding: the state in the layout for decoding token by token, or None.
        last_state: the state. None before the first token, and while only `decoding` is up to date.
        seen: the number of tokens appended to each row, with pads, as transformers counts cache positions.
        owned: True if nothing else holds the state's tensors, so that kernels may write into them.
        snapshot: the recorded older state, or None.
        trail: keys, values and the mask of tokens that are not pads, since the snapshot, or None.
    """

    decoding: Decoding | None
    last_state: State | None
    is_compileable = True
    is_croppable = True
    # Neither True nor False: transformers takes the sizes of a mask from the first layer of either kind.
    is_sliding: bool | None = None
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
        """Delete what was recorded for a crop. Tokens from before this call cannot be removed afterwards."""
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
        """Append new tokens to the state, and return their outputs `[B, heads, T, Dv]`.

        Args:
            attention: the layer's parameters.
            q: `[B, heads, T, D]`.
            k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            valid: `[B, T]` bool, False for pads, or None if there are none.
            sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
        """
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
        """Return True if the next token is computed by `Decoding`, the fast decoding step in plain torch.

        That is the case on a CPU, without gradients, outside compiled code, and after at least one token.
        """
        if self.decoding is None and self.last_state is None:
            return False
        return decoding_backend(attention, q) == "torch"

    def decode(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None
    ) -> Tensor:
        """Append one token of every row to the state by `Decoding`, the fast decoding step in plain torch.

        Args:
            attention: the layer's parameters.
            q: `[B, heads, 1, D]`.
            k, v: `[B, kv, 1, D]` and `[B, kv, 1, Dv]`.
            sink_logits: `[heads]`, learned logits without a value, or None.

        Returns:
            The outputs `[B, heads, 1, Dv]`.
        """
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
        """Copy the state into the layout for decoding token by token, set it as `decoding`, and return it."""
        assert self.last_state is not None  # `decodes` has seen it
        forget_derived(attention)
        self.decoding = Decoding(attention.equation, self.last_state)
        return self.decoding

    @property
    def state(self) -> State | None:
        """Return the state after all tokens, or None before the first.

        On a CPU, later tokens do not change it. On a GPU, a decoding step may write into it.
        """
        if self.last_state is None and self.decoding is not None:
            self.last_state = self.decoding.state()
        return self.last_state

    @state.setter
    def state(self, state: State | None) -> None:
        self.last_state, self.decoding = state, None

    def state_to_write(
        self, attention: LinearAttention, q: Tensor, sink_logits: Tensor | None
    ) -> State | None:
        """Return the state, for Triton kernels that write new tokens into it, or None if they cannot compute
        them.

        It is None, too, before the first token, while the past is recorded for a crop, and with sink logits.
        If something else may hold the state's tensors, it is copied first.

        Args:
            q: `[B, heads, T, D]`, the queries (or keys) of the new tokens.
            sink_logits: `[heads]`, learned logits without a value, or None.
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
        if why_not(attention, state, q) is not None or trial(attention, q) is not None:
            return None
        attention.ran = "triton"
        return state

    def append(
        self, attention: LinearAttention, state: State, k: Tensor, v: Tensor, valid: Tensor | None
    ) -> None:
        """Store the state after new tokens. If the layer records its past for a crop, record the tokens too.

        Args:
            attention: the layer's parameters.
            state: the state after the new tokens.
            k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            valid: `[B, T]` bool, False for pads, or None if there are none.
        """
        if self.record_past:
            self.record(attention, k, v, valid)
        self.state, self.owned = state.compact(), False
        self.seen += k.shape[-2]
        self.begin()

    def begin(self) -> None:
        """Set the flag `is_initialized`, by which transformers knows that the layer holds tokens."""
        self.has_previous_state[0] = self.is_initialized = True

    def record(self, attention: LinearAttention, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Record new tokens, so that a later crop can remove them.

        They are appended to the trail (the recorded keys and values). Tokens beyond the last ROLLBACK are
        moved from the trail into the snapshot (the state before the trail).

        Args:
            k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
            valid: `[B, T]` bool, False for pads, or None if there are none.
        """
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
        """Compute an earlier state: the recorded snapshot, plus the first `length` tokens recorded after it
        (the trail).

        Raises:
            RuntimeError: nothing was recorded.
        """
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
        """Remove the last tokens from the state, and delete the record of the past.

        Args:
            tokens_to_remove: minus the number of tokens to remove. With 0 only the record is deleted.

        Raises:
            RuntimeError: the past was not recorded, or fewer tokens were recorded.
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
        """Return the bytes of the state, or 0 before the first token."""
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
    """The cache layer of a layer that has both attention and a Mamba mixer (Falcon-H1, Zamba2).

    It holds a `State`, and the mixer's own conv and recurrent states, which are moved here from the cache's
    own layer. A recurrent state cannot be cropped.
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
