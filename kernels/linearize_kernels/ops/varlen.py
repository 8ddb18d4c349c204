"""`varlen`: sequences of any lengths packed into one row without pads, each computed as if it were alone.

For Triton's kernels, all sequences are copied into one sequence of slots, the timeline. Each begins at a
chunk and is filled up to whole chunks with empty slots. Tables tell the kernels where the sequence of each
chunk begins. S is zero at that place.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.ops.backend import Prefill, prefill
from linearize_kernels.ops.chunked import chunked
from linearize_kernels.ops.prefill import far_factor, far_read, repeat_heads, taps
from linearize_kernels.parts.feature_maps import unit_norm
from linearize_kernels.remembered import remembered
from linearize_kernels.torch_forms.chunks import Tiling
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.sliding import Shape, Tokens
from linearize_kernels.triton.tuning import SEGMENT, Packed


def varlen(
    attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chunk: int | None = None
) -> Tensor:
    """Compute n sequences that are packed into one row, each from an empty state.

    Triton's kernels compute them together if they can run. Otherwise `chunked` computes one after the other.

    Args:
        q: `[heads, total, D]`, the tokens of all sequences.
        k, v: `[kv, total, D]` and `[kv, total, Dv]`.
        cu_seqlens: `[n + 1]` integers from 0 to `total`. Sequence i has tokens `cu_seqlens[i]` to
            `cu_seqlens[i + 1] - 1`. It is read once: keep it on the CPU, so that no device has to be waited
            for.
        chunk: tokens in a chunk. With None a good number is chosen. Groups have their own size.

    Returns:
        `[heads, total, Dv]` in q's dtype.

    Raises:
        ValueError: the equation is not causal, `cu_seqlens` is not as described, or `attention.impl` asks for
            what cannot run.
    """
    if not attention.equation.causal:
        raise ValueError("varlen takes no equation that sees ahead: use bidirectional on every sequence")
    given, total = cu_seqlens.tolist(), q.shape[-2]
    if not total or (given[0], given[-1]) != (0, total) or given != sorted(given):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {total}; it is {given}")
    bounds = tuple(dict.fromkeys(given))  # without empty sequences
    plan = packed_plan(attention, q, k, v, chunk=chunk)
    if plan is not None:
        attention.ran = "triton"
        rows = group_rows if attention.equation.scope == "group" else sliding_rows
        return rows(attention, plan, q, k, v, bounds)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    apart = zip(*(x[None].split(lengths, -2) for x in (q, k, v)), strict=True)
    outputs = [
        chunked(attention, None, own_q, own_k, own_v, chunk=chunk)[0][0] for own_q, own_k, own_v in apart
    ]
    return torch.cat(outputs, -2)


def packed_plan(
    attention: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    has_sink_logits: bool = False,
    chunk: int | None = None,
) -> Prefill | None:
    """Return how Triton computes packed q, k, v `[..., T, D]`, or None if its kernels cannot run.

    Args:
        has_sink_logits: True if the softmax has learned sink logits, which the kernels do not compute.
        chunk: tokens in a chunk. With None a good number is chosen.
    """
    plan = prefill(attention, (q, k, v), 0, has_sink_logits, chunk, packed=True)
    return plan if plan is not None and plan.name == "triton" else None


class Layout(NamedTuple):
    """The places that the tokens of packed sequences are copied to: n chunks of C places, each sequence starting at a
    chunk.

    Attributes:
        rows: `[total]`, the place (0 to n C - 1) of each token.
        position: `[n C]`, the position of each place in its own sequence.
        packed: the tables of where sequences begin, which the kernels read.
    """

    rows: Tensor
    position: Tensor
    packed: Packed


@remembered(8)
def laid_out(bounds: tuple[int, ...], chunk: int, recent: int, sinks: int, device: torch.device) -> Layout:
    """Compute where packed sequences are copied to: whole chunks, after `recent` empty places.

    Args:
        bounds: the first token of each sequence, followed by the number of all tokens. No sequence is empty.
        chunk: tokens in a chunk.
        recent: R, the places before its own that a chunk reads.
        sinks: the number of attention sinks of each sequence.
        device: the device of the results.
    """
    begin = torch.tensor(bounds)
    length = begin.diff()
    chunks = length.add(chunk - 1).div(chunk, rounding_mode="floor")
    segments = chunks.add(SEGMENT - 1).div(SEGMENT, rounding_mode="floor")
    first_chunk, first_segment = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (chunks, segments))
    first_row = first_chunk[:-1] * chunk
    rows = torch.arange(bounds[-1]) + (first_row - begin[:-1]).repeat_interleave(length)
    position = torch.arange(int(first_chunk[-1]) * chunk) - first_row.repeat_interleave(chunks * chunk)
    own = torch.arange(int(first_segment[-1])) - first_segment[:-1].repeat_interleave(segments)
    by_segment = first_chunk[:-1].repeat_interleave(segments) + SEGMENT * own
    begins = (first_row + recent + sinks).repeat_interleave(chunks)
    tables = (begins, torch.cat([by_segment, first_chunk[-1:]]), first_segment)
    begins, by_segment, first_segment = (x.to(device, torch.int32) for x in tables)
    packed = Packed(begins, by_segment, first_segment, sinks)
    return Layout(rows.to(device), position.to(device), packed)


def laid(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Copy each token of `x [heads, total, X]` to its place in a tensor `[heads, length, X]`. Other places
    are zero.

    Args:
        places: `[total]`, the index of each token in the result.
        length: the number of places.
    """
    return x.new_zeros(len(x), length, x.shape[-1]).index_copy(1, places, x)


def sliding_rows(
    attention: LinearAttention, plan: Prefill, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]
) -> Tensor:
    """Compute packed sequences by the Triton kernels for a sliding softmax window.

    Args:
        plan: the choice of the kernels.
        q: `[heads, total, D]`.
        k, v: `[kv, total, D]` and `[kv, total, Dv]`.
        bounds: the first token of each sequence, followed by `total`.

    Returns:
        The outputs `[heads, total, Dv]`.
    """
    eq, narrow, wide = attention.equation, q.dtype, accumulator(q.dtype)
    shape = Shape(plan.chunk, eq.recent, eq.size, eq.scale, 0, 0)
    rows, position, packed = laid_out(bounds, shape.chunk, eq.recent, eq.sinks, q.device)
    q = laid(q, rows, len(position)).unflatten(0, (eq.far_heads, -1))
    k, v = (eq.to_far_heads(laid(x, eq.recent + rows, eq.recent + len(position))) for x in (k, v))
    phi_q = phi_k = mix = None
    far = far_read(attention)
    if far is not None:
        phi_q, phi_k = far.queries(q.to(wide)).to(narrow), far.written(k.to(wide)).to(narrow)
        if eq.sinks:
            is_sink = pad(position < eq.sinks, (eq.recent, 0), value=True)
            phi_k = phi_k.masked_fill(is_sink[:, None], 0.0)
        mix = far_factor(attention, q.to(wide), position, 0)
    no_state = (None, None, None, None)
    tokens = Tokens._make((q, k, v, phi_q, phi_k, mix, taps(attention, 1), *no_state))
    return plan.form.triton(shape, tokens, packed)[0].flatten(0, 1).index_select(1, rows)


def group_rows(
    attention: LinearAttention, plan: Prefill, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]
) -> Tensor:
    """Compute packed sequences by the Triton kernels for squared ReLU within groups of tokens.

    Args:
        plan: the choice of the kernels.
        q: `[heads, total, D]`.
        k, v: `[kv, total, D]` and `[kv, total, Dv]`.
        bounds: the first token of each sequence, followed by `total`.

    Returns:
        The outputs `[heads, total, Dv]`.
    """
    eq, narrow, wide = attention.equation, q.dtype, accumulator(q.dtype)
    rows, position, packed = laid_out(bounds, plan.chunk, 0, 0, q.device)
    q, k, v = (laid(x, rows, len(position)).to(wide) for x in (q, k, v))
    q, k, v = q.unflatten(0, (eq.far_heads, -1)), eq.to_far_heads(k), eq.to_far_heads(v)
    phi_q = phi_k = factor = None
    far, far_factors = far_read(attention), attention.combine.factor
    if far is not None and far_factors is not None:
        phi_q, phi_k = far.queries(q), far.written(k)
        factor = repeat_heads(attention, far_factors, 1)
    by_token = (None if x is None else x.to(narrow) for x in (unit_norm(q), unit_norm(k), v, phi_q, phi_k))
    tokens = Groups._make((*by_token, factor, taps(attention, 1), None))
    out = plan.form.triton(Tiling(plan.chunk, 0), 0, tokens, packed)[0]
    return out.flatten(0, 1).index_select(1, rows)
