"""The choice of what computes an operation: torch, Triton, or the reference `block`, which computes any
equation.

`attention.impl` asks for "auto" (Triton on a GPU where its kernels can run, else torch), "torch" or "triton".
"auto" first tries the kernels on a few tokens (`ops.trial`). "triton" raises ValueError where no kernel can run.
Nothing here imports Triton before a kernel is to run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.ops.fused import can_fuse
from linearize_kernels.ops.fused import grouped as fused_grouped
from linearize_kernels.ops.fused import sliding as fused_sliding
from linearize_kernels.ops.prefill import grouped_segment, sliding_segment
from linearize_kernels.ops.trial import failure
from linearize_kernels.state import State
from linearize_kernels.torch_forms.grouped import grouped
from linearize_kernels.torch_forms.sliding import sliding
from linearize_kernels.triton.forms import grouped as triton_grouped
from linearize_kernels.triton.forms import sliding as triton_sliding
from linearize_kernels.triton.tuning import limit

IMPLEMENTATIONS = ("auto", "torch", "triton")
MOST_SINKS = 64  # in Triton's kernels
SEGMENT = 4096  # tokens times heads that a CPU works on together


class Form(NamedTuple):
    """A fast algorithm that computes one kind of equation chunk by chunk.

    Attributes:
        segment: the function that prepares the inputs of a segment (consecutive tokens) and runs `torch` or
            `triton`.
        torch, triton: the two implementations, with the same arguments and results.
        fused: the function that computes a segment in Triton directly from q, k and v.
    """

    segment: Callable
    torch: Callable
    triton: Callable
    fused: Callable


FORMS = {  # by scope, score and combine
    ("sliding", "softmax", "shared"): Form(sliding_segment, sliding, triton_sliding, fused_sliding),
    ("group", "relu2", "none"): Form(grouped_segment, grouped, triton_grouped, fused_grouped),
}


class Prefill(NamedTuple):
    """A chosen algorithm and implementation. Calling it computes one segment (consecutive tokens) of a
    sequence.

    Attributes:
        name: the implementation, "torch" or "triton".
        form: the algorithm.
        chunk: tokens in a chunk.
        dtype: the dtype in which q, k, v and features are passed to the implementation. It is the inputs'
            dtype for Triton, which sums products in fp32. For torch it is fp32 (or fp64 for fp64 inputs).
        is_fused: True if Triton's fused kernels compute the segment (see `ops.fused`).
    """

    name: str
    form: Form
    chunk: int
    dtype: torch.dtype
    is_fused: bool = False

    def __call__(
        self, attention: LinearAttention, state: State | None, count: int, *heads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the attention of one segment, T consecutive tokens.

        Args:
            attention: the layer's parameters.
            state: the state after the tokens before the segment. It may be None before the first token, if the
                kernels are fused.
            count: the number of tokens before the segment, the same in every row.
            heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.

        Returns:
            The outputs `[B, heads, T, Dv]`, and the running sums S and z of the linear part after the
            segment.
        """
        attention.ran = self.name
        run = self.form.triton if self.name == "triton" else self.form.torch
        with torch.autocast(
            heads[0].device.type, enabled=False
        ):  # it would narrow some products, and not others
            if self.is_fused:
                return self.form.fused(attention, state, count, heads, self.chunk)
            return self.form.segment(attention, state, count, heads, self.chunk, self.dtype, run)


def prefill(
    attention: LinearAttention,
    heads: tuple[Tensor, Tensor, Tensor],
    count: int | None,
    has_sink_logits: bool = False,
    chunk: int | None = None,
    packed: bool = False,
) -> Prefill | None:
    """Choose the fast algorithm and the implementation (torch or Triton) that compute T tokens.

    Args:
        heads: q, k, v `[..., T, D]`.
        count: tokens in every row so far. None if the rows differ, or if reading the number would wait for
            the device. Then only the reference `block` can be used.
        has_sink_logits: True if the softmax has learned sink logits, which no fast algorithm computes.
        chunk: tokens in a chunk. With None a good number is chosen. Groups have their own size.
        packed: True for sequences that are packed into one row.

    Returns:
        The choice, or None if only the reference `block` can compute the tokens.

    Raises:
        ValueError: `attention.impl` is "triton" and no kernel can run, or is not a known name.
    """
    if attention.impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is one of {', '.join(IMPLEMENTATIONS)}, not {attention.impl!r}")
    eq, q, length = attention.equation, heads[0], heads[0].shape[-2]
    form = form_of(attention, count, length, has_sink_logits)
    if form is None:
        if attention.impl == "triton":
            raise ValueError(
                "no Triton kernel computes this: there are kernels for a sliding softmax window with weights as far "
                "features and one normaliser, and for squared ReLU in groups with a sum over all before, both without "
                "pads between tokens. Use impl='auto'."
            )
        return None
    own = eq.size if eq.scope == "group" else chunk
    if wants_triton(attention, q):
        plan = Prefill("triton", form, own or eq.chunk, q.dtype, can_fuse(attention, q) and not packed)
        reason = why_not_prefill(attention, *heads, plan.chunk, packed)
        if reason is None and attention.impl == "auto":
            reason = trial(attention, plan, q)
        if reason is None:
            return plan
        if attention.impl == "triton":
            raise ValueError(f"Triton's kernels cannot run: {reason}. Use impl='auto'.")
    rows = 64 if eq.value_dim > 32 else 32  # wider heads have a larger S by chunk
    size = eq.size if eq.scope == "group" else min(own or rows, length)
    return Prefill("torch", form, size, accumulator(q.dtype))


def trial(attention: LinearAttention, plan: Prefill, q: Tensor) -> str | None:
    """Return why a layer's Triton kernels fail on the device of q, or None if they run (see `ops.trial`)."""

    def run(*heads: Tensor) -> Tensor:
        if plan.is_fused:  # compiled apart from the kernels that read a state
            plan(attention, None, 0, *heads)
        return plan(attention, attention.empty_state(1, q.device, q.dtype), 0, *heads)[0]

    return failure(attention, q, "prefill and training", 2 * plan.chunk, run)


def wants_triton(attention: LinearAttention, q: Tensor) -> bool:
    """Return True if Triton is to be tried for q: `attention.impl` is "triton", or "auto" and q is on a GPU."""
    return attention.impl == "triton" or (attention.impl == "auto" and q.is_cuda)


def decoding_backend(attention: LinearAttention, q: Tensor) -> str | None:
    """Choose what computes a decoding step or a token tree for q `[B, heads, T, D]`.

    Returns:
        "triton" for the kernels of `triton.nodes` (if `nodes.why_not` allows it, too), or "torch" for the
        decoding step of `ops.decode`. None means the functions of `ops.chunked`, which alone have gradients
        and work under torch.compile.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if wants_triton(attention, q):
        return "triton"
    return "torch" if q.device.type == "cpu" else None


def form_of(attention: LinearAttention, count: int | None, length: int, has_sink_logits: bool) -> Form | None:
    """Return the fast algorithm that computes an equation for `length` tokens, or None if only the reference
    `block` can.

    Args:
        count: tokens in every row so far, or None if the rows differ.
        has_sink_logits: True if the softmax has learned sink logits.
    """
    eq = attention.equation
    own = eq.softcap is None and attention.distance_bias is None and eq.memory == "none"
    if count is None or has_sink_logits or not own or attention.dropped == "local":
        return None
    if count + length < eq.sinks or eq.sinks > eq.recent or eq.size == 0 or eq.feature_map == "linformer":
        return None
    few = eq.causal and 2 * length < eq.size and attention.impl != "triton"  # too few for a whole chunk
    if few or (eq.scope == "group" and (eq.sinks or not eq.causal)):
        return None
    return FORMS.get((eq.scope, eq.score, eq.combine))


def why_not_prefill(
    attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, chunk: int, packed: bool = False
) -> str | None:
    """Return why Triton cannot compute the attention of q, k, v `[..., T, D]`, or None if it can.

    Args:
        chunk: tokens in a chunk.
        packed: True for sequences that are packed into one row.
    """
    eq = attention.equation
    features = 0 if attention.far is None else attention.far.state_width[0]
    reason = limit(q, k, v, features, chunk, "groups" if eq.scope == "group" else "chunks")
    most = min(MOST_SINKS, chunk) if packed else MOST_SINKS
    if reason is None and eq.sinks > most:
        return f"{eq.sinks} sinks are more than {most}"
    return reason


def segment_tokens(form: Form | Prefill | None, q: Tensor) -> int:
    """Return how many tokens of q `[B, heads, T, D]` to compute at once (a segment).

    On a CPU a segment fits the processor's caches. On a GPU it is large enough to keep the kernels busy.

    Args:
        form: the chosen algorithm, or None if the reference `block` computes the segment.
    """
    rows = max(q.shape[0] * q.shape[1], 1)
    if form is None:
        return 2048
    if q.is_cuda:
        return max(4096, (1 << 15) // max(len(q), 1))
    return max(128, SEGMENT // rows // 64 * 64)
