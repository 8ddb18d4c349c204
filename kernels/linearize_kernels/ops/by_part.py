"""Rows of a batch and heads of S that are worked on together, and what of a layer and a state is theirs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.equation import Equation, LinearAttention
from linearize_kernels.parts.combine import per_head
from linearize_kernels.torch_forms.tiles import at_once


class Part(NamedTuple):
    """Rows of a batch, and heads of S, that are worked on together."""

    rows: slice
    heads: slice


def lanes_together(attention: LinearAttention, batch: int, length: int) -> tuple[int, int]:
    """Rows and heads of S that are worked on together on a CPU: as many lanes of so many tokens as its cache holds."""
    eq, far = attention.equation, attention.far
    if far is not None and not far.splits:
        return batch, eq.far_heads
    columns = max(0 if far is None else far.state_width[0], 2 * eq.recent)
    lanes = at_once(eq.heads // eq.far_heads * length * columns)
    return (batch, min(lanes // batch, eq.far_heads)) if lanes >= batch else (1, min(lanes, eq.far_heads))


def parts(
    attention: LinearAttention, sums: tuple[Tensor, Tensor], q: Tensor, *tokens: Tensor
) -> Iterator[tuple[Part, list[Tensor]]]:
    """What is worked on together: all on a GPU, as much on a CPU as its cache holds. Of those rows and heads, q
    `[B, far, g, T, D]`, the tokens `[B, far, slots, D]`, S and z.
    """
    eq, batch = attention.equation, len(q)
    on_cpu = q.device.type == "cpu"
    rows, heads = lanes_together(attention, batch, q.shape[2]) if on_cpu else (batch, eq.far_heads)
    every = [q.unflatten(1, (eq.far_heads, -1)), *(eq.to_far_heads(x) for x in tokens), *sums]
    for row, own in enumerate(zip(*(x.split(rows) for x in every), strict=True)):
        for head, some in enumerate(zip(*(x.split(heads, 1) for x in own), strict=True)):
            part = Part(*(slice(i * size, (i + 1) * size) for i, size in ((row, rows), (head, heads))))
            yield part, some


def of_queries(attention: LinearAttention, parameter: Tensor, heads: slice) -> Tensor:
    """A parameter `[heads, ...]` of the queries that read some heads of S: `[some, g, ...]`."""
    return parameter.unflatten(0, (attention.equation.far_heads, -1))[heads]


def mix_of(attention: LinearAttention, heads: slice) -> Tensor | None:
    """The combine's mix, as `far_factor` takes it."""
    mix = attention.combine.mix
    return None if mix is None else of_queries(attention, mix, heads)


def nothing_far(
    equation: Equation, first: int, rows: int, length: int, device: torch.device
) -> Tensor | None:
    """Which of so many rows, from the one at position `first` on, have nothing far among `length` tokens, `[rows]`;
    None: all have.
    """
    if first >= equation.sinks + equation.size:
        return None
    position = torch.arange(first, first + rows, device=device)
    near = position < equation.sinks + equation.size
    return near if equation.causal else near & (position > length - 1 - equation.size)


def far_factor(mix: Tensor | None, q: Tensor, nothing: Tensor | None) -> Tensor:
    """The logarithm of the far part's factor, `[B, some, g, T]`, by the mix `[some, g, D + 1]` of these queries; -inf
    for the rows that have `nothing` far.
    """
    factor = q.new_zeros(q.shape[:-1]) if mix is None else per_head(mix.flatten(0, 1), q)
    return factor if nothing is None else factor.masked_fill(nothing, float("-inf"))


def taps(attention: LinearAttention, batch: int, heads: slice, dtype: torch.dtype) -> Tensor | None:
    """The conv of every lane, `[B * some, g, W]`."""
    if attention.conv is None:
        return None
    own = of_queries(attention, attention.conv, heads).to(dtype)
    return own if batch == 1 else own.repeat(batch, 1, 1)


def sinks_with(sink_k: Tensor, sink_v: Tensor, count: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values of the sinks once the tokens k, v have followed `count` others."""
    sinks = sink_k.shape[-2]
    first, second = (min(tokens, sinks) for tokens in (count, count + k.shape[-2]))
    if first == sinks:
        return [sink_k, sink_v]
    return [
        torch.cat([x[..., :first, :], new[..., : second - first, :], x[..., second:, :]], -2)
        for x, new in ((sink_k, k), (sink_v, v))
    ]
