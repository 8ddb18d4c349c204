"""The equation over long sequences (`chunked`), and the state after many tokens (`advance`, `commit`)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.backend import Prefill, prefill, segment_tokens
from linearize_kernels.ops.prefill import after
from linearize_kernels.ops.rows import by_groups, rows_alike
from linearize_kernels.reference.block import block, evaluate
from linearize_kernels.reference.visibility import ancestors, behind, chain, shared_layout
from linearize_kernels.state import State

STORED = 1 << 15  # tokens times heads whose activations are stored for the backward on a CPU


@dataclass(frozen=True)
class Advance:
    """New tokens laid out in chunks of C tokens, with the states between the chunks.

    Attributes:
        starts: the states before the chunks as one `State` with leading dimensions `[chunks, batch]`. `count`
            and `recent_position` have a batch of 1 if all rows are at the same position.
        k, v: the new tokens, `[chunks, batch, kv, C, D]` and `[chunks, batch, kv, C, Dv]`.
        position: `[chunks, batch or 1, C]`, each token's position in its row, or -1 for pads.
        final: the state after the last token.
    """

    starts: State
    k: Tensor
    v: Tensor
    position: Tensor
    final: State


def advance(
    attention: LinearAttention,
    state: State,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    chunk: int,
    in_step: bool,
) -> Advance:
    """Append T tokens to a state, and compute the state before each chunk of them.

    The state's recent tokens and the new ones are put in one sequence of slots, called the timeline: oldest
    first, pads before all others. More empty slots at its head fill it up to whole chunks. A chunk's recent
    tokens are the R slots before it, and all older tokens are in S.

    Args:
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads, or None if there are no pads.
        chunk: tokens in a chunk.
        in_step: True if all rows are at the same position and none has pads. Positions, masks and counts then
            have one row for the whole batch.
    """
    eq = attention.equation
    k, v, position = timeline(state, k, v, valid, -k.shape[-2] % chunk, in_step)
    chunks = (k.shape[-2] - eq.recent) // chunk

    sinks = torch.arange(eq.sinks, device=k.device)
    stored = (sinks < state.count[:, None])[:, None, :, None]
    arrived = (position[:, None, :] == sinks[:, None])[:, None].to(k.dtype)  # [B, 1, sinks, slots]
    sink_k = torch.where(stored, state.sink_k, arrived @ k)
    sink_v = torch.where(stored, state.sink_v, arrived @ v)
    S, z = prefix_sums(attention, state, k, v, position, chunks, chunk)

    slots = position[:, eq.recent :].unflatten(-1, (chunks, chunk)).movedim(1, 0)
    new = (slots >= 0).sum(-1).flip(0).cumsum(0).flip(0)  # [chunks, B]: tokens from this chunk on
    end = position.amax(-1) + 1
    end = torch.where(end > 0, end, state.count[: end.shape[0]])

    def cut(x: Tensor, first: int, size: int) -> Tensor:  # [B, kv, slots, D] -> [chunks, B, kv, size, D]
        x = x[..., first : first + (chunks - 1) * chunk + size, :]
        return x.unfold(2, size, chunk).movedim(2, 0).transpose(-1, -2)

    starts = State(
        S=S[:-1],
        z=z[:-1],
        sink_k=sink_k.expand(chunks, *sink_k.shape),
        sink_v=sink_v.expand(chunks, *sink_v.shape),
        recent_k=cut(k, 0, eq.recent),
        recent_v=cut(v, 0, eq.recent),
        recent_position=position[:, : k.shape[-2] - chunk].unfold(1, eq.recent, chunk).movedim(1, 0),
        count=end - new,
    )
    tail = slice(k.shape[-2] - eq.recent, None)
    final = State(
        S=S[-1],
        z=z[-1],
        sink_k=sink_k,
        sink_v=sink_v,
        recent_k=k[..., tail, :],
        recent_v=v[..., tail, :],
        recent_position=position[:, tail].expand(k.shape[0], -1),
        count=end.expand(k.shape[0]),
    )
    return Advance(starts, cut(k, eq.recent, chunk), cut(v, eq.recent, chunk), slots, final)


def timeline(
    state: State, k: Tensor, v: Tensor, valid: Tensor | None, fill: int, in_step: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Put empty places, the state's R recent tokens and T new tokens in one sequence, the timeline.

    Args:
        k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads, or None. With pads, each row is sorted so that empty places come
            first.
        fill: the number of empty places at the head.
        in_step: True if one row of positions serves the whole batch.

    Returns:
        Keys `[B, kv, fill + R + T, D]`, values `[B, kv, fill + R + T, Dv]`, and positions
        `[B or 1, fill + R + T]`, which are -1 in empty places.
    """
    rows = slice(0, 1 if in_step else None)
    position = torch.cat(
        [state.recent_position[rows], next_positions(state.count[rows], k.shape[-2], valid)], -1
    )
    k = pad(torch.cat([state.recent_k, k], -2), (0, 0, fill, 0))
    v = pad(torch.cat([state.recent_v, v], -2), (0, 0, fill, 0))
    position = pad(position, (fill, 0), value=-1)
    if valid is not None:
        order = position.argsort(dim=-1, stable=True)
        k, v, position = take(k, order), take(v, order), position.gather(-1, order)
    return k, v, position


def next_positions(count: Tensor, length: int, valid: Tensor | None) -> Tensor:
    """Return the positions `[B, T]` of T new tokens, -1 for pads.

    Args:
        count: `[B]`, the number of earlier tokens of each row.
        length: T.
        valid: `[B, T]` bool, False for pads, or None if there are none.
    """
    if valid is None:
        return count[:, None] + torch.arange(length, device=count.device)
    return torch.where(valid, count[:, None] + valid.cumsum(-1) - 1, -1)


def prefix_sums(
    attention: LinearAttention, state: State, k: Tensor, v: Tensor, position: Tensor, chunks: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute the running sums S and z of the linear part before each chunk of tokens, and after the last
    chunk.

    The tokens are R recent ones followed by the chunks. S before a chunk holds all tokens older than the R
    tokens before the chunk, except the attention sinks.

    Args:
        state: the state before the tokens.
        k, v: the tokens, `[B, kv, R + chunks * chunk, D]` and `[.., Dv]`.
        position: `[B or 1, R + chunks * chunk]`, the tokens' positions, -1 in empty places.
        chunks: the number of chunks.
        chunk: tokens in a chunk.

    Returns:
        S `[chunks + 1, B, far, F, Dv]` and z `[chunks + 1, B, far, F]`. If the equation has no linear part,
        they are those of `state`.
    """
    if attention.far is None:
        S, z = (x.expand(chunks + 1, *x.shape) for x in (state.S, state.z))
        return S, z
    old = slice(0, chunks * chunk)
    k, v = (x[..., old, :].to(state.S.dtype).unflatten(-2, (chunks, chunk)) for x in (k, v))
    return attention.far.fold(state.S, state.z, k, v, position[:, old].unflatten(-1, (chunks, chunk)))


def commit(
    attention: LinearAttention, state: State, k: Tensor, v: Tensor, valid: Tensor | None = None
) -> State:
    """Return the state after T tokens, such as the accepted path of a token tree. The given state does not
    change.

    Args:
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads, or None if there are none.
    """
    count = rows_count(state, valid)
    if count is None:
        return advance(attention, state, k, v, valid, k.shape[-2], in_step=False).final
    return append(attention, state, count, k, v)


def append(attention: LinearAttention, state: State, count: int, k: Tensor, v: Tensor) -> State:
    """Return the state after T more tokens. Every row has had `count` tokens before, and none of the T is a
    pad.

    Tokens that are no longer among the last R are added to S and z.

    Args:
        k, v: the new tokens, `[B, kv, T, D]` and `[B, kv, T, Dv]`.
    """
    eq, length = attention.equation, k.shape[-2]
    S, z = state.S, state.z
    folds = slice(
        max(0, eq.sinks - count + eq.recent), length
    )  # the slots of what drops out of the recent ones
    if attention.far is not None and folds.start < length:
        pairs = (state.recent_k, k), (state.recent_v, v)
        dropped = (torch.cat([x, new[..., :length, :]], -2)[..., folds, :].to(S.dtype) for x, new in pairs)
        position = torch.arange(folds.start, length, device=k.device)[None] + (count - eq.recent)
        dropped_k, dropped_v = dropped
        S, z = attention.far.append(S, z, dropped_k, dropped_v, position)
    return after(attention, state, S, z, count, k, v)


def nodes(
    attention: LinearAttention,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parents: tuple[int, ...],
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute the outputs `[B, heads, T, Dv]` of the T nodes of a token tree that follows a state. The state
    is only read.

    This is the reference: any equation, in plain torch.

    Args:
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        parents: the index of each node's parent, -1 for a root. Parents come before their children.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
    """
    count = rows_count(state, None)
    if count is None:
        visible, depth = (x.to(q.device) for x in ancestors(parents))
        layout = behind(attention.equation, state, state.count[:, None] + depth, visible)
    else:
        layout = shared_layout(attention.equation, [count], parents)
    return evaluate(attention, state, q, k, v, layout, sink_logits)


def chunked(
    attention: LinearAttention,
    state: State | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    sink_logits: Tensor | None = None,
    chunk: int | None = None,
    segment: int | None = None,
) -> tuple[Tensor, State]:
    """Compute the equation over T tokens that follow one another: for training, prefill and decoding.

    The tokens are cut into segments, which are computed one after the other with a carried state. A segment
    is computed by a fast form in chunks (torch or Triton, chosen by `ops.backend`) if the equation has one,
    or else by the slow reference `block`. The time is linear in T. Without gradients, the memory beyond q, k,
    v and the output is that of one segment. With gradients on a CPU, the activations of long sequences are
    recomputed in the backward.

    Args:
        state: the state before the tokens, or None at the start of a sequence.
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads (anywhere), or None if there are none.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
        chunk: tokens in a chunk. With None a good number is chosen.
        segment: tokens in a segment. With None a good number is chosen.

    Returns:
        `[B, heads, T, Dv]` in q's dtype, and the state after the last token.
    """
    in_step = state is None and valid is None
    groups = rows_alike(attention, state, valid, q, sink_logits is not None)
    empty = partial(attention.empty_state, q.shape[0], q.device, k.dtype)
    if groups is not None and (valid is not None or len(groups) > 1):

        def group(before: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
            return chunked(attention, before, q, k, v, None, sink_logits, chunk, segment)

        return by_groups(groups, state or empty(), q, k, v, group)
    count = groups[0].before if groups else 0 if in_step else rows_count(state, valid)
    plan = prefill(attention, (q, k, v), count, sink_logits is not None, chunk)
    segment = segment or segment_tokens(plan, q)
    # `split` puts the gradients of the segments together once, where slices would add them up.
    parts = [x.split(segment, -2) for x in (q, k, v)]
    pads = [None] * len(parts[0]) if valid is None else valid.split(segment, -1)
    recomputes = torch.is_grad_enabled() and not q.is_cuda and q.shape[:-1].numel() > STORED
    outputs = []
    for own_q, own_k, own_v, own in zip(*parts, pads, strict=True):
        size = own_q.shape[-2]
        plan = prefill(attention, (own_q, own_k, own_v), count, sink_logits is not None, chunk)
        if state is None and (plan is None or not plan.is_fused or size < attention.equation.recent):
            state = empty()
        if plan is not None and count is not None:
            if recomputes and state is not None:
                out, S, z = recompute(plan, attention, state, count, own_q, own_k, own_v)
            else:
                out, S, z = plan(attention, state, count, own_q, own_k, own_v)
            state = after(attention, state, S, z, count, own_k, own_v)
        else:
            assert state is not None
            attention.ran = "block"
            slots = chunk or attention.equation.chunk
            heads = own_q, own_k, own_v
            out, state = run_segment(attention, state, count, *heads, own, sink_logits, slots, in_step)
        outputs.append(out.to(q.dtype))
        count = None if count is None else count + size
    assert state is not None  # there is at least one token
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2), state


def recompute(
    plan: Prefill, attention: LinearAttention, state: State, count: int, *heads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a segment with gradient checkpointing: its activations are recomputed in the backward.

    The recomputation in the backward uses the equation of the forward, even if the layer's equation was
    changed in between. Training does so when it uses a shorter window for one step.

    Args:
        plan: the chosen implementation, which computes the segment.
        state: the state before the segment.
        count: the number of earlier tokens, the same in every row.
        heads: q `[B, heads, T, D]`, k `[B, kv, T, D]` and v `[B, kv, T, Dv]`.

    Returns:
        The outputs `[B, heads, T, Dv]`, and S and z after the segment.
    """
    equation = attention.equation

    def compute(state: State, count: int, *heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current, attention.equation = attention.equation, equation
        try:
            return plan(attention, state, count, *heads)
        finally:
            attention.equation = current

    return checkpoint(compute, state, count, *heads, use_reentrant=False, preserve_rng_state=False)


def rows_count(state: State | None, valid: Tensor | None) -> int | None:
    """Return the number of earlier tokens if it is the same in all rows. It is 0 without a state.

    The result is None if the rows differ, if there are pads among the new tokens (`valid` is not None), in
    compiled code, or if the count is on another device than the CPU, which would have to be waited for.
    """
    if valid is not None or torch.compiler.is_compiling():
        return None
    if state is None:
        return 0
    if state.count.device.type != "cpu":
        return None
    counts = state.count.tolist()
    return counts[0] if min(counts) == max(counts) else None


def run_segment(
    attention: LinearAttention,
    state: State,
    count: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    sink_logits: Tensor | None,
    chunk: int,
    in_step: bool,
) -> tuple[Tensor, State]:
    """Compute one segment (consecutive tokens) by the slow reference `block`.

    Args:
        count: tokens that every row has had, or None if the rows differ (see `rows_count`).
        q, k, v: the segment's tokens, `[B, heads or kv, T, D]`.
        valid: `[B, T]` bool, False for pads, or None if there are none.
        sink_logits: `[heads]`, learned logits without a value, or None.
        chunk: tokens in a chunk.
        in_step: True if all rows are at the same position and none has pads.

    Returns:
        The outputs `[B, heads, T, Dv]`, and the state after the segment.
    """
    length = q.shape[-2]
    if count is not None and length <= chunk:
        after = append(attention, state, count, k, v)
        return nodes(attention, state, q, k, v, chain(length), sink_logits), after
    chunk = min(chunk, length)
    if valid is not None:
        order = valid.long().argsort(dim=-1, stable=True)  # pads first, as in the timeline
        q = take(q, order)
    layout = advance(attention, state, k, v, valid, chunk, in_step)
    q = pad(q, (0, 0, -length % chunk, 0)).unflatten(-2, (-1, chunk)).movedim(2, 0)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    out = block(attention, layout.starts, q, layout.k, layout.v, layout.position, causal, sink_logits)
    out = out.movedim(0, 2).flatten(2, 3)[..., -length:, :].to(q.dtype)
    return (out if valid is None else take(out, order.argsort(-1))), layout.final


def take(x: Tensor, order: Tensor) -> Tensor:
    """Select tokens of every row: x `[B, heads, N, D]` at the indices `order [B, T]` gives
    `[B, heads, T, D]`.
    """
    return x.gather(-2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
