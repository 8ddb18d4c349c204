"""`varlen`: sequences of any lengths packed into one row, each as if it were alone, without pads between them.

Triton's kernels take them on one timeline in which every sequence begins with a chunk and is filled up to whole chunks.
They are told where each chunk's own sequence begins, and S starts from nothing there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.ops.blocked import (
    far_factor,
    fitting,
    grouped_segment,
    mix_of,
    of_queries,
    sliding_segment,
    taps,
)
from linearize_kernels.ops.chunked import chunked
from linearize_kernels.parts.feature_maps import unit_norm
from linearize_kernels.remembered import remembered
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.sliding_lane import Shape, Tokens
from linearize_kernels.torch_forms.tiles import Packed, Tiling
from linearize_kernels.triton.grouped import grouped
from linearize_kernels.triton.sliding import sliding, why_not
from linearize_kernels.triton.tiles import SEGMENT

EVERY = slice(None)  # heads of S, which go together


def varlen(
    attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, chunk: int | None = None
) -> Tensor:
    """The equation over n sequences, one behind the other, each from an empty state.

    Computed by Triton's kernels where `runs` says so, else by `chunked` on every sequence, which is the reference.

    Args:
        q: `[heads, total, D]`; k, v: `[kv, total, D]`.
        cu_seqlens: `[n + 1]` integers, from 0 to `total`: sequence i has tokens `cu_seqlens[i]` to
            `cu_seqlens[i + 1] - 1`. Read once; on the CPU, no device is waited for.
        chunk: tokens per chunk, but of groups; None chooses.

    Returns:
        `[heads, total, Dv]` in q's dtype.

    Raises:
        ValueError: the equation sees ahead, `cu_seqlens` is something else, or `attention.impl` asks for what there is
            not.
    """
    if not attention.equation.causal:
        raise ValueError("varlen takes no equation that sees ahead: use bidirectional on every sequence")
    bounds, total = cu_seqlens.tolist(), q.shape[-2]
    if not total or (bounds[0], bounds[-1]) != (0, total) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {total}; it is {bounds}")
    bounds = tuple(dict.fromkeys(bounds))  # without empty sequences
    if runs(attention, q, k, v, chunk=chunk):
        attention.ran = "triton"
        return form_of(attention, total)(attention, q, k, v, bounds, chunk)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    apart = zip(*(x[None].split(lengths, -2) for x in (q, k, v)), strict=True)
    return torch.cat([chunked(attention, None, *own, chunk=chunk)[0][0] for own in apart], -2)


def runs(
    attention: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    has_sink_logits: bool = False,
    chunk: int | None = None,
) -> bool:
    """Whether Triton's kernels are to compute packed sequences of q, k, v `[..., T, D]`, as `attention.impl` asks."""
    eq = attention.equation
    if attention.impl == "torch" or form_of(attention, q.shape[-2], has_sink_logits) is None:
        return False
    phi = None if attention.far is None else q.new_empty(0, attention.far.q_map.feature_dim)
    tokens = Tokens(q, k, v, phi, phi, *[None] * 6)
    chunk = eq.size if eq.scope == "group" else chunk or eq.chunk
    return attention.impl == "triton" or why_not(Tiling(chunk, eq.recent), tokens, eq.sinks) is None


def form_of(attention: LinearAttention, total: int, has_sink_logits: bool = False) -> Callable | None:
    """What computes so many packed tokens by Triton's kernels; None: there are none for the equation."""
    return FORMS.get(fitting(attention, 0, total, has_sink_logits))


class Layout(NamedTuple):
    """Where packed sequences are on their timeline.

    Attributes:
        rows: `[total]`, each token's; position: `[n C]`, each row's in its own sequence.
        packed: what the kernels read.
    """

    rows: Tensor
    position: Tensor
    packed: Packed


@remembered(8)
def laid_out(bounds: tuple[int, ...], chunk: int, recent: int, sinks: int, device: torch.device) -> Layout:
    """Sequences between `bounds`, none of them empty, behind `recent` empty slots."""
    begin = torch.tensor(bounds)
    length = begin.diff()
    chunks = length.add(chunk - 1).div(chunk, rounding_mode="floor")
    segments = chunks.add(SEGMENT - 1).div(SEGMENT, rounding_mode="floor")
    first_chunk, first_segment = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (chunks, segments))
    first_row = first_chunk[:-1] * chunk
    rows = torch.arange(bounds[-1]) + (first_row - begin[:-1]).repeat_interleave(length)
    position = torch.arange(first_chunk[-1] * chunk) - first_row.repeat_interleave(chunks * chunk)
    own = torch.arange(first_segment[-1]) - first_segment[:-1].repeat_interleave(segments)
    by_segment = first_chunk[:-1].repeat_interleave(segments) + SEGMENT * own
    begins = (first_row + recent + sinks).repeat_interleave(chunks)
    tables = (begins, torch.cat([by_segment, first_chunk[-1:]]), first_segment)
    packed = Packed(*(x.to(device, torch.int32) for x in tables), sinks)
    return Layout(rows.to(device), position.to(device), packed)


def laid(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Tokens `x [heads, total, X]` at their places among so many; what is not there is zero."""
    return x.new_zeros(len(x), length, x.shape[-1]).index_copy(1, places, x)


def sliding_rows(
    attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], chunk: int | None
) -> Tensor:
    """`varlen` of the form of `sliding_segment`."""
    eq, narrow = attention.equation, q.dtype
    shape = Shape(chunk or eq.chunk, eq.recent, eq.size, eq.scale, 0, 0)
    rows, position, packed = laid_out(bounds, shape.chunk, eq.recent, eq.sinks, q.device)
    q = laid(q, rows, len(position)).unflatten(0, (eq.far_heads, -1))
    k, v = (eq.to_far_heads(laid(x, eq.recent + rows, eq.recent + len(position))) for x in (k, v))
    phi_q = phi_k = mix = None
    wide = accumulator(narrow)
    if attention.far is not None and attention.dropped != "far":
        wide_q = q.to(wide)
        phi_q = attention.far.queries(wide_q, EVERY).to(narrow)
        phi_k = attention.far.written(k.to(wide), EVERY).to(narrow)
        if eq.sinks:
            is_sink = pad(position < eq.sinks, (eq.recent, 0), value=True)
            phi_k = phi_k.masked_fill(is_sink[:, None], 0.0)
        nothing = position < eq.size + eq.sinks
        mix = far_factor(mix_of(attention, EVERY), wide_q, nothing)
    tokens = Tokens(q, k, v, phi_q, phi_k, mix, taps(attention, 1, EVERY, wide), None, None, None, None)
    return sliding(shape, tokens, packed)[0].flatten(0, 1).index_select(1, rows)


def group_rows(
    attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], chunk: int | None
) -> Tensor:
    """`varlen` of the form of `grouped_segment`; the chunks are the groups."""
    eq, narrow, wide = attention.equation, q.dtype, accumulator(q.dtype)
    rows, position, packed = laid_out(bounds, eq.size, 0, 0, q.device)
    q, k, v = (laid(x, rows, len(position)).to(wide) for x in (q, k, v))
    q, k, v = q.unflatten(0, (eq.far_heads, -1)), eq.to_far_heads(k), eq.to_far_heads(v)
    phi_q = phi_k = factor = None
    if attention.far is not None and attention.dropped != "far":
        phi_q, phi_k = attention.far.queries(q, EVERY), attention.far.written(k, EVERY)
        factor = of_queries(attention, attention.combine.factor, EVERY)
    lanes = (None if x is None else x.to(narrow) for x in (unit_norm(q), unit_norm(k), v, phi_q, phi_k))
    tokens = Groups(*lanes, factor, taps(attention, 1, EVERY, wide), None)
    return grouped(Tiling(eq.size, 0), 0, tokens, packed)[0].flatten(0, 1).index_select(1, rows)


FORMS: dict[Callable, Callable] = {sliding_segment: sliding_rows, grouped_segment: group_rows}
