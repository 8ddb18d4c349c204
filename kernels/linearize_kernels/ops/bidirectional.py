"""`bidirectional`: whole sequences in which every token sees all others, as in encoders."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize_kernels.equation import LinearAttention, accumulator
from linearize_kernels.ops.backend import prefill
from linearize_kernels.ops.chunked import next_positions, rows_count, take
from linearize_kernels.ops.rows import by_groups, rows_alike
from linearize_kernels.reference.block import evaluate
from linearize_kernels.reference.visibility import lay_out
from linearize_kernels.state import State


def bidirectional(
    attention: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    sink_logits: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute the attention of whole rows in which every token sees all others, as in encoders.

    Queries are processed in chunks. A chunk reads its own tokens and R tokens on either side by their keys.
    It reads all other tokens through the running sum S of the tokens before, plus that of the tokens after.
    No sum is made by subtraction, which would lose precision.

    Args:
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads (anywhere), or None if there are none.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
        chunk: tokens in a chunk. With None a good number is chosen.

    Returns:
        `[B, heads, T, Dv]` in q's dtype. The outputs of pads are arbitrary.

    Raises:
        ValueError: `attention.impl` is "triton" and no kernel can run, or is not a known name.
    """
    groups = None if valid is None else rows_alike(attention, None, valid, q, sink_logits is not None)
    if groups is not None:

        def group(before: None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            return bidirectional(attention, q, k, v, None, sink_logits, chunk), None

        return by_groups(groups, None, q, k, v, group)[0]
    plan = prefill(attention, (q, k, v), rows_count(None, valid), sink_logits is not None, chunk)
    if plan is None:
        attention.ran = "block"
        return by_block(attention, q, k, v, valid, sink_logits, chunk)
    state = attention.empty_state(q.shape[0], q.device, k.dtype)
    return plan(attention, state, 0, q, k, v)[0].to(q.dtype)


def by_block(
    attention: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    sink_logits: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute `bidirectional` by the reference `block`, for any equation. Every chunk becomes one row of a
    batch.

    Args:
        q: `[B, heads, T, D]`.
        k, v: `[B, kv, T, D]` and `[B, kv, T, Dv]`.
        valid: `[B, T]` bool, False for pads (anywhere), or None if there are none.
        sink_logits: `[heads]`, learned logits without a value in the local softmax (gpt-oss), or None.
        chunk: the least number of tokens in a chunk, or None for 32.

    Returns:
        `[B, heads, T, Dv]` in q's dtype. The outputs of pads are arbitrary.
    """
    eq, length, dtype = attention.equation, q.shape[-2], q.dtype
    chunk = max(chunk or 32, eq.recent, eq.sinks)
    chunks, side = -(-length // chunk), eq.recent
    position = next_positions(
        torch.zeros(q.shape[0] if valid is not None else 1, dtype=torch.long, device=q.device), length, valid
    )
    if valid is not None:
        order = (~valid).long().argsort(dim=-1, stable=True)  # pads last: a token's slot is its position
        q, k, v, position = take(q, order), take(k, order), take(v, order), position.gather(-1, order)
    fill = chunks * chunk - length
    q = pad(q, (0, 0, 0, fill))
    k, v = (pad(x, (0, 0, side, fill + side)) for x in (k, v))
    position = pad(position, (side, fill + side), value=-1)

    def windows(x: Tensor, first: int, size: int) -> Tensor:  # [B, .., slots, X] -> [n, B, .., size, X]
        x = x[..., first : first + (chunks - 1) * chunk + size, :]
        return x.unfold(-2, size, chunk).movedim(-3, 0).transpose(-1, -2)

    def places(first: int, size: int) -> Tensor:  # [n, B or 1, size]
        return windows(position[..., None], first, size).squeeze(-1)

    S, z = outside(attention, k, v, position, chunks, chunk)
    left, own, right = (0, side), (side, chunk), (side + chunk, side)
    recent_position = torch.cat([places(*left), places(*right)], -1)
    new_position = places(*own)
    total = (position >= 0).sum(-1)
    sinks = torch.arange(eq.sinks, device=q.device)
    sink_position = torch.where(sinks < total[:, None], sinks, -1).expand(chunks, -1, -1).clone()
    sink_position[0] = -1  # the first chunk has them among its own
    inside = ((recent_position >= eq.sinks).sum(-1)) + (new_position >= eq.sinks).sum(-1)
    recent_position = recent_position.masked_fill(recent_position < eq.sinks, -1)
    every = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device)
    folded = (total - eq.sinks).clamp_min(0) > inside
    layout = lay_out(eq, recent_position, new_position, every, sink_position, folded)
    state = State(
        S=S,
        z=z,
        sink_k=k[..., side : side + eq.sinks, :].expand(chunks, -1, -1, -1, -1),
        sink_v=v[..., side : side + eq.sinks, :].expand(chunks, -1, -1, -1, -1),
        recent_k=torch.cat([windows(k, *left), windows(k, *right)], -2),
        recent_v=torch.cat([windows(v, *left), windows(v, *right)], -2),
        recent_position=recent_position,
        count=total,
    )
    out = evaluate(
        attention,
        state,
        q.unflatten(-2, (chunks, chunk)).movedim(-3, 0),
        windows(k, *own),
        windows(v, *own),
        layout,
        sink_logits,
    )
    out = out.movedim(0, -3).flatten(-3, -2)[..., :length, :].to(dtype)
    return out if valid is None else take(out, order.argsort(-1))


def outside(
    attention: LinearAttention, k: Tensor, v: Tensor, position: Tensor, chunks: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute, for each chunk of C tokens, the sums S and z over all tokens that are more than R places away
    from it.

    Args:
        k, v: `[B, kv, R + n C + R, D]` and `[B, kv, R + n C + R, Dv]`: the tokens, with R empty places at
            both ends.
        position: `[B or 1, R + n C + R]`, each token's position, -1 in empty places.
        chunks: n, the number of chunks.
        chunk: C.

    Returns:
        S = Σ φ(k) vᵀ `[n, B, far, F, Dv]` and z = Σ φ(k) `[n, B, far, F]`. Both are zero if the equation has
        no linear part.
    """
    side, wide = attention.equation.recent, accumulator(k.dtype)
    empty = attention.empty_state(k.shape[0], k.device, k.dtype)
    if attention.far is None:
        S, z = (x.expand(chunks, *x.shape) for x in (empty.S, empty.z))
        return S, z
    far = attention.far

    def folded(first: int, backwards: bool) -> tuple[Tensor, Tensor]:
        part = slice(first, first + chunks * chunk)
        keys, values = (x[..., part, :].to(wide).unflatten(-2, (chunks, chunk)) for x in (k, v))
        places = position[:, part].unflatten(-1, (chunks, chunk))
        if backwards:
            keys, values, places = keys.flip(-3), values.flip(-3), places.flip(-2)
        sums = far.fold(empty.S, empty.z, keys, values, places)
        S, z = (x[:chunks].flip(0) if backwards else x[:chunks] for x in sums)
        return S, z

    before, behind = folded(0, backwards=False), folded(2 * side, backwards=True)
    return before[0] + behind[0], before[1] + behind[1]
