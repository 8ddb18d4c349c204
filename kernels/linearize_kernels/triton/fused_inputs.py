"""The inputs of the fused kernels. `fused` explains slots and segments. Nothing here imports Triton."""

from typing import NamedTuple

from torch import Tensor

TILE = 32  # queries, and keys, that a program works on together


class Heads(NamedTuple):
    """The inputs of a layer: q, k and v in any layout with contiguous vectors, and the state before them.

    Attributes:
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        recent_k, recent_v: `[B, kv, R, D]` and `[B, kv, R, Dv]`, contiguous, or None if no token came before.
        S, z: `[B, far, F, Dv]` and `[B, far, F]`, contiguous, or None for zeros.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    recent_k: Tensor | None
    recent_v: Tensor | None
    S: Tensor | None
    z: Tensor | None


class Features(NamedTuple):
    """The features of the linear part, given or to be computed.

    Attributes:
        name: "identity", "elu" or "relu", which the kernels compute where they need them, or "given".
        q, k: `[B heads, T, F]` and `[B far, slots, F]`, or None if they are not given. Those of keys are
            weighted.
        key_weight: w and b of ω, `[far, D + 1]`, or None. It is not read if the features are given.
    """

    name: str
    q: Tensor | None
    k: Tensor | None
    key_weight: Tensor | None


class Place(NamedTuple):
    """How a text is cut into segments of chunks.

    Attributes:
        chunk: C, tokens in a chunk.
        recent: R, the recent tokens of a state.
        skip: the first slot that is neither empty nor a sink.
        lead: the slot of the first new token.
        rows: the number of query rows. In the group form, those before the first new token count too.
        cut: the sums after the text include the slots below it.
        segment: slots in a segment.
    """

    chunk: int
    recent: int
    skip: int
    lead: int
    rows: int
    cut: int
    segment: int

    @property
    def span(self) -> int:
        """Return the number of chunks of a segment."""
        return self.segment // self.chunk

    @property
    def segments(self) -> int:
        """Return the number of segments, each of which a program works through."""
        return -(-self.rows // self.segment)


class Window(NamedTuple):
    """The window and the sinks of the sliding form.

    Attributes:
        size: tokens in the window.
        scale: the factor of q·k.
        start: the position of the first new token.
        mix: `[heads, D + 1]`, the weights of the linear part's logit, or None for a logit of 0.
        sink_k, sink_v: `[B, kv, sinks, D]` and `[B, kv, sinks, Dv]`, in any layout with contiguous vectors.
    """

    size: int
    scale: float
    start: int
    mix: Tensor | None
    sink_k: Tensor
    sink_v: Tensor
