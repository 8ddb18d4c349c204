"""Segments of `chunked`, and rows of `bidirectional`, in blocks: which equations have such a form, and what it takes
and leaves of a state.

On a CPU, a few heads at a time, and of the sliding form a piece at a time, go all the way from their features to their
outputs, so that what is made on the way stays in its cache. On a GPU all go together, through Triton's kernels where
there are any.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.ops.by_part import (
    Part,
    far_factor,
    mix_of,
    nothing_far,
    of_queries,
    parts,
    sinks_with,
    taps,
)
from linearize_kernels.state import State
from linearize_kernels.torch_forms.grouped import Groups, UnitNorm, grouped
from linearize_kernels.torch_forms.sliding import sliding
from linearize_kernels.torch_forms.sliding_lane import Shape, Tokens
from linearize_kernels.torch_forms.sliding_pieces import sliding_pieces
from linearize_kernels.torch_forms.sliding_run import Inputs, Run
from linearize_kernels.torch_forms.tiles import Tiling, led
from linearize_kernels.triton.grouped import grouped as triton_grouped
from linearize_kernels.triton.grouped import why_not as why_not_grouped
from linearize_kernels.triton.sliding import sliding as triton_sliding
from linearize_kernels.triton.sliding import why_not as why_not_sliding

Segment = Callable[
    [LinearAttention, State, int, Tensor, Tensor, Tensor, int | None, Tensor | None], tuple[Tensor, State]
]


class Form(NamedTuple):
    """A blocked form's implementations, which take the same and return the same, and why Triton's cannot run."""

    torch: Callable
    triton: Callable
    why_not: Callable


FEW_ROWS = 32  # of a chunk on a CPU: the fewer, the less is made for nothing, and the slower are products

SLIDING = Form(sliding, triton_sliding, why_not_sliding)
GROUP = Form(grouped, triton_grouped, why_not_grouped)


def sliding_segment(
    attention: LinearAttention,
    state: State,
    count: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int | None,
    place: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Softmax in a sliding window, positive features, one normaliser; not causal: over whole rows, whose state after
    them means nothing.
    """
    eq, length = attention.equation, k.shape[-2]
    by_pieces = q.device.type == "cpu" and attention.impl != "triton"
    chunk = min(chunk or FEW_ROWS, length) if by_pieces else chunk or eq.chunk
    fill = -length % chunk
    ahead = 0 if eq.causal else eq.recent + -2 * eq.recent % chunk
    first = count - fill - eq.recent  # the position of the first slot
    start = count - fill if eq.causal else eq.sinks
    shape = Shape(chunk, eq.recent, eq.size, eq.scale, start, max(fill, eq.sinks - first), ahead=ahead)
    if by_pieces:
        attention.ran = "torch"
        kept = state.recent_k, state.recent_v, state.sink_k, state.sink_v
        inputs = Inputs(q, k, v, *(x.to(accumulator(q.dtype)) for x in (state.S, state.z)), *kept)
        has_far = attention.far is not None and attention.dropped != "far"
        out, S, z = sliding_pieces(Run(attention, shape, count, length, has_far), inputs, place)
        return out, after(state, S, z, count, k, v)
    nothing = nothing_far(eq, count - fill, fill + length, length, q.device)
    wide, narrow = accumulator(q.dtype), narrowed(attention, q)

    def lanes(x: Tensor) -> Tensor:  # [B, far, ...] -> [B * far, ...]
        return x.flatten(0, 1).to(narrow)

    results = Results(len(q), eq.far_heads, place)
    pairs = state.recent_k, state.recent_v, state.sink_k, state.sink_v
    for part, own in parts(attention, (state.S, state.z), q, k, v, *pairs):
        heads = part.heads
        own_q, new_k, new_v, old_k, old_v, *sinks, S, z = own
        own_q, own_k, own_v = (
            led(own_q, fill),
            timeline(old_k, new_k, count, fill + eq.recent, ahead),
            timeline(old_v, new_v, count, fill + eq.recent, ahead),
        )
        phi_q = phi_k = mix = None
        if attention.far is not None and attention.dropped != "far":
            phi_q = lanes(attention.far.queries_between(own_q.to(wide), heads, fill))
            phi_k = lanes(attention.far.written_between(own_k.to(wide), heads, shape.skip, ahead))
            mix = far_factor(mix_of(attention, heads), own_q.to(wide), nothing).flatten(0, 1)
        conv, S, z = taps(attention, len(own_q), heads, wide), S.flatten(0, 1), z.flatten(0, 1)
        sinks = map(lanes, sinks_with(*sinks, count, new_k, new_v))
        tokens = Tokens(*map(lanes, (own_q, own_k, own_v)), phi_q, phi_k, mix, conv, S, z, *sinks)
        out, *sums = evaluate(attention, SLIDING, tokens, wide, shape)
        results.add(
            part, *(x.unflatten(0, (len(own_q), -1)) for x in (out[:, :, fill:] if fill else out, *sums))
        )
    out, S, z = results.whole()
    return out.flatten(1, 2), after(state, S, z, count, k, v)


def narrowed(attention: LinearAttention, q: Tensor) -> torch.dtype:
    """Of what a form reads by token: Triton sums products of narrow numbers in fp32, torch does not."""
    by_triton = attention.impl == "triton" or (attention.impl == "auto" and q.is_cuda)
    return q.dtype if by_triton else accumulator(q.dtype)


def evaluate(
    attention: LinearAttention,
    form: Form,
    tokens: Tokens | Groups,
    wide: torch.dtype,
    shape: Tiling,
    *folds: int,
) -> tuple[Tensor, ...]:
    """A form by the implementation that `attention.impl` asks for; `attention.ran` says which it was."""
    with torch.autocast(tokens.q.device.type, enabled=False):  # it would narrow some products, and not others
        if attention.impl == "triton" or (attention.impl == "auto" and form.why_not(shape, tokens) is None):
            attention.ran = "triton"
            return form.triton(shape, *folds, tokens)
        attention.ran = "torch"
        if tokens.q.dtype != wide:
            tokens = type(tokens)(*(None if x is None else x.to(wide) for x in tokens))
        return form.torch(shape, *folds, tokens)


def grouped_segment(
    attention: LinearAttention,
    state: State,
    count: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int | None,
    place: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Squared ReLU in groups, a sum over all before, no normaliser; the chunks are the groups."""
    eq, length = attention.equation, k.shape[-2]
    opened, total, reach = count % eq.size, count + length, max(eq.conv_width - 1, 0)
    behind = -total % eq.size  # empty rows after the last
    first = eq.recent - opened  # the open group's first slot
    absent = max(0, eq.recent - count)

    def rows(x: Tensor) -> Tensor:  # [B, far, g, T, X] -> [B * far, g, n C, X]
        return led(x, opened, behind).flatten(0, 1)

    def groups(x: Tensor, before: int = 0) -> Tensor:  # [B, far, slots, X] -> [B * far, before + n C, X]
        x = x if first <= before else x[..., first - before :, :]
        return led(x, max(before - first, 0), behind).flatten(0, 1)

    wide, narrow, results = accumulator(q.dtype), narrowed(attention, q), Results(len(q), eq.far_heads, place)
    for part, own in parts(attention, (state.S, state.z), q, k, v, state.recent_k, state.recent_v):
        heads = part.heads
        own_q, new_k, new_v, old_k, old_v, start, z = (x.to(accumulator(x.dtype)) for x in own)
        own_k, own_v = (timeline(old, new, count, eq.recent) for old, new in ((old_k, new_k), (old_v, new_v)))
        unit_q, unit_k = UnitNorm.apply(own_q), UnitNorm.apply(own_k)
        phi_q = phi_k = phi = factor = None
        S, folds = start, 0
        if attention.far is not None and attention.dropped != "far":
            far_q, phi = unit_q, unit_k
            if not attention.far.takes_unit_vectors:
                far_q = attention.far.queries(own_q, heads)
                phi = led(attention.far.written(own_k[..., absent:, :], heads), absent)
            phi_q, phi_k, z = rows(far_q), groups(phi), z + phi[..., :length, :].sum(-2)
            factor = of_queries(attention, attention.combine.factor, heads).to(q.dtype).repeat(len(own_q), 1)
            folds = max(0, (length - first) // eq.size)
            if count:
                S = S + phi[..., :first, :].mT @ own_v[..., :first, :]
        lanes = (rows(unit_q), groups(unit_k), groups(own_v, reach), phi_q, phi_k)
        lanes = (None if x is None else x.to(narrow) for x in lanes)
        tokens = Groups(*lanes, factor, taps(attention, len(own_q), heads, wide), S.flatten(0, 1))
        out, S = evaluate(attention, GROUP, tokens, wide, Tiling(eq.size, reach), folds)
        out, S = (x.unflatten(0, (len(own_q), -1)) for x in (out[:, :, opened : opened + length], S))
        if phi is not None:  # the state has folded all but the last R tokens, in whole groups or not
            done = first + folds * eq.size if length >= first else 0
            rest = phi[..., done:length, :].mT @ own_v[..., done:length, :]
            S = (S if done else start) + rest
        results.add(part, out, S, z)
    out, S, z = results.whole()
    return out.flatten(1, 2), after(state, S, z, count, k, v)


class Results:
    """What some parts after others give. Without gradients each goes to its place at once, and its own memory to the
    next; the outputs `[B, far, g, T, Dv]` to `place [B, heads, T, Dv]`, where there is one.
    """

    def __init__(self, batch: int, heads: int, place: Tensor | None):
        self.size, self.found, self.places = (batch, heads), [], []
        self.place = None if place is None else place.unflatten(1, (heads, -1))

    def add(self, part: Part, out: Tensor, S: Tensor, z: Tensor) -> None:
        whole = self.place is None and out.shape[:2] == self.size
        if torch.is_grad_enabled() or whole:
            if part.heads.start == 0:
                self.found.append([])
            self.found[-1].append((out, S, z))
            return
        if not self.places:
            self.places = [
                x.new_empty(*self.size, *x.shape[2:]) for x in (out, S, z)[self.place is not None :]
            ]
            if self.place is not None:
                self.places.insert(0, self.place)
        for place, result in zip(self.places, (out, S, z), strict=True):
            place[part] = result

    def whole(self) -> list[Tensor]:
        if self.places:
            return self.places
        rows = [[joined(x, 1) for x in zip(*row, strict=True)] for row in self.found]
        return [joined(x, 0) for x in zip(*rows, strict=True)]


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def timeline(old: Tensor, new: Tensor, count: int, before: int, ahead: int = 0) -> Tensor:
    """`before` slots, the last of which hold as many recent tokens as there are, the new tokens and `ahead` slots; what
    is not there is zero.
    """
    there = min(count, old.shape[-2], before)
    kept = torch.cat([old[..., old.shape[-2] - there :, :], new], -2) if there else new
    return led(kept, before - there, ahead)


def after(state: State, S: Tensor, z: Tensor, count: int, k: Tensor, v: Tensor) -> State:
    """The state, whose rows have had `count` tokens each, with S and z and after the tokens k, v."""
    recent, length = state.recent_k.shape[-2], k.shape[-2]

    def last(old: Tensor, new: Tensor) -> Tensor:
        kept = old[..., min(length, recent) :, :]
        return torch.cat([kept, new[..., max(length - recent, 0) :, :]], -2)

    end = count + length
    position = torch.arange(end - recent, end, device=S.device).clamp_min(-1)
    return State(
        S,
        z,
        *sinks_with(state.sink_k, state.sink_v, count, k, v),
        recent_k=last(state.recent_k, k),
        recent_v=last(state.recent_v, v),
        recent_position=position.expand_as(state.recent_position),
        count=state.count + length,
    )


FORMS: dict[tuple[str, str, str], Segment] = {
    ("sliding", "softmax", "shared"): sliding_segment,
    ("group", "relu2", "none"): grouped_segment,
}
IMPLEMENTATIONS = ("auto", "torch", "triton")


def segment_of(
    attention: LinearAttention, count: int | None, length: int, has_sink_logits: bool
) -> Segment | None:
    """What evaluates a segment; None: only `block` does.

    Args:
        count: tokens in every row so far, or None: the rows differ, or are on a GPU and not to be waited for.

    Raises:
        ValueError: `attention.impl` asks for what there is not.
    """
    if attention.impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is one of {', '.join(IMPLEMENTATIONS)}, not {attention.impl!r}")
    found = fitting(attention, count, length, has_sink_logits)
    if attention.impl == "triton" and found is None:
        raise ValueError(
            "no Triton kernel computes this: there are kernels for a sliding softmax window with weights as far "
            "features and one normaliser, and for squared ReLU in groups with a sum over all before, both without "
            "pads. Use impl='auto'."
        )
    return found


def tokens_at_once(run: Segment | None, q: Tensor) -> int:
    """How many tokens a segment has best: as many as may be in memory together, and as are worth a GPU's launches."""
    if run is None:
        return 2048
    by_pieces = run is sliding_segment and not q.is_cuda  # which are what is in memory together
    return max(4096, (1 << 15) // max(len(q), 1)) if q.is_cuda or by_pieces else 4096


def fitting(
    attention: LinearAttention, count: int | None, length: int, has_sink_logits: bool
) -> Segment | None:
    """The blocked form of an equation, as `segment_of` says it."""
    eq = attention.equation
    own = eq.softcap is None and attention.distance_bias is None and eq.memory == "none"
    if count is None or has_sink_logits or not own or attention.dropped == "local":
        return None
    if count + length < eq.sinks or eq.sinks > eq.recent or eq.size == 0:
        return None
    if eq.feature_map == "linformer":
        return None
    # A few tokens do not pay for a whole chunk.
    few = eq.causal and 2 * length < eq.size and attention.impl != "triton"
    if few or (eq.scope == "group" and (eq.sinks or not eq.causal)):
        return None
    return FORMS.get((eq.scope, eq.score, eq.combine))
