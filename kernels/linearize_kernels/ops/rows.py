"""Rows of different lengths, such as prompts with pads in front: rows that are alike are computed together, without
their pads, so that the fast forms compute them too.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.backend import form_of
from linearize_kernels.state import State

AnyState = TypeVar("AnyState", State, None)


class Alike(NamedTuple):
    """Rows that have had the same number of tokens, and get the same number of new ones.

    Attributes:
        before: the number of earlier tokens of each row.
        tokens: where the new tokens are among T columns. The other columns are pads.
        rows: the rows' indices.
    """

    before: int
    tokens: slice
    rows: list[int]


def rows_alike(
    attention: LinearAttention, state: State | None, valid: Tensor | None, q: Tensor, has_sink_logits: bool
) -> list[Alike] | None:
    """Sort the rows of q `[B, heads, T, D]` into groups that are alike. Every row is in one group.

    Args:
        state: the state before the tokens, or None at the start of a sequence.
        valid: `[B, T]` bool, False for pads, or None if there are none.
        has_sink_logits: True if the softmax has learned sink logits.

    Returns:
        The groups. None if no fast form computes them, if there are pads between a row's tokens, or if the numbers
        cannot be read: in compiled code and while a CUDA graph is recorded. On a GPU, reading them waits for it.
    """
    length = q.shape[-2]
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        return None
    if form_of(attention, attention.equation.sinks, length, has_sink_logits) is None:
        return None
    counts = [0] * len(q) if state is None else state.count.tolist()
    spans = [(0, length)] * len(q)
    if valid is not None:
        place = torch.arange(length, device=valid.device)
        end = torch.where(valid, place + 1, 0).amax(-1)
        begin = torch.where(valid, place, length).amin(-1).minimum(end)
        between = valid.sum(-1) - (end - begin)
        *ends, gaps = torch.stack([begin, end, between]).tolist()
        if any(gaps):
            return None
        spans = list(zip(*ends, strict=True))
    groups: dict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(counts, spans, strict=True)):
        groups[key].append(row)
    return [Alike(before, slice(*span), rows) for (before, span), rows in groups.items()]


def by_groups(
    groups: list[Alike],
    state: AnyState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compute: Callable[[AnyState, Tensor, Tensor, Tensor], tuple[Tensor, AnyState]],
) -> tuple[Tensor, AnyState]:
    """Compute groups of rows one after the other, without their pads.

    Args:
        groups: all rows (see `rows_alike`).
        state: the state before the tokens, or None for a computation that needs none.
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        compute: computes a group's outputs and its state afterwards, from the state before and its q, k and v.

    Returns:
        `[B, heads, T, Dv]` in q's dtype, zero at pads, and the state after all tokens, or None.
    """
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    states: list[Any] = []
    for _, tokens, indices in groups:
        rows = torch.tensor(indices, device=q.device)
        own = state if state is None else state.map(partial(torch.index_select, dim=0, index=rows))
        if tokens.start < tokens.stop:
            own_q, own_k, own_v = (x[rows][..., tokens, :] for x in (q, k, v))
            found, own = compute(own, own_q, own_k, own_v)
            out[rows, :, tokens] = found.to(q.dtype)
        states.append(own)
    if state is None:
        return out, state
    order = torch.tensor([row for group in groups for row in group.rows], device=q.device).argsort()
    fields = {name: torch.cat([getattr(own, name) for own in states])[order] for name in vars(state)}
    return out, State(**fields)
