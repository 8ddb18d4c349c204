"""The sliding form on a CPU: one lane after the other, and of each one piece after the other, go all the way from their
features to their outputs in memory that the CPU's cache holds. Of a piece only S and z before it are kept: the backward
makes the rest again, from the last piece to the first.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.equation import LinearAttention
from linearize_kernels.torch_forms.modules import buffers_of, parameters_of, plain, with_tensors
from linearize_kernels.torch_forms.sliding_room import Piece
from linearize_kernels.torch_forms.sliding_run import Inputs, Run, fill_rows


def sliding_pieces(run: Run, inputs: Inputs, place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[B, heads, T, Dv]` in q's dtype, and S and z after all tokens. place: where the outputs go; not with
    gradients.
    """
    run = replace(run, attention=plain(run.attention))
    with torch.autocast(inputs.q.device.type, enabled=False):  # it would narrow some products, and not others
        if torch.is_grad_enabled():
            return Pieces.apply(run, *inputs, *parameters_of(run.attention).values())
        if place is None:
            place = inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
        S, z, _ = run_forward(run, inputs, place)
        return place, S, z


class Pieces(torch.autograd.Function):
    """Of the inputs and of the attention's parameters. The backward makes the features again by a copy of the attention
    that has the parameters and buffers of the forward; those that have changed since are refused.
    """

    @staticmethod
    def forward(ctx, run: Run, *tensors: Tensor):
        inputs = Inputs(*tensors[: len(Inputs._fields)])
        out = inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
        S, z, before = run_forward(run, inputs, out)
        buffers = buffers_of(run.attention)
        ctx.run, ctx.names = run, [*parameters_of(run.attention), *buffers]
        ctx.save_for_backward(*tensors, *buffers.values(), *(x for pair in before for x in pair))
        return out, S, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_S: Tensor, d_z: Tensor):
        saved, count = list(ctx.saved_tensors), len(Inputs._fields)
        inputs, rest, learns = Inputs(*saved[:count]), saved[count:], ctx.needs_input_grad[1 + count :]
        held, sums = rest[: len(ctx.names)], rest[len(ctx.names) :]
        own = {name: x.detach() for name, x in zip(ctx.names, held, strict=True)}
        d_own = {
            name: torch.zeros_like(own[name].requires_grad_(), dtype=inputs.S.dtype) if asked else None
            for name, asked in zip(ctx.names, learns, strict=False)
        }
        attention = ctx.run.attention
        d_attention = with_tensors(attention, own | d_own)
        wanted = tuple(ctx.run.learned(d_attention, slice(None)))
        run = replace(ctx.run, attention=with_tensors(attention, own), wanted=wanted, rooms={})
        before = list(zip(sums[::2], sums[1::2], strict=True))
        with torch.autocast(inputs.q.device.type, enabled=False):
            d = run_backward(run, inputs, before, d_attention, d_out, d_S, d_z)
        of_inputs = (of_heads(x, to) for x, to in zip(d, inputs, strict=True))
        return None, *of_inputs, *(None if x is None else x.to(own[name].dtype) for name, x in d_own.items())


def run_forward(run: Run, inputs: Inputs, out: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Writes the outputs `[B, heads, T, Dv]`, and returns S and z after all tokens, and before each piece."""
    S, z, before = torch.empty_like(inputs.S), torch.empty_like(inputs.z), []
    out = out.unflatten(1, (S.shape[1], -1))
    for share in run.shares(inputs):
        part, sums, place = share.part, share.sums, out[share.part]
        for piece in run.pieces(len(sums[0])):
            before.append(sums)
            room = run.load(share, piece, *sums)
            sums = [x.clone() for x in room.forward(piece, run.attention, part.heads)]
            place[..., piece.tokens, :].copy_(room.out[..., piece.fill :, :])
        S[part], z[part] = (x.view(to[part].shape) for x, to in zip(sums, (S, z), strict=True))
    run.leave()
    return S, z, before


def run_backward(
    run: Run,
    inputs: Inputs,
    before: list[tuple[Tensor, Tensor]],
    d_attention: LinearAttention,
    d_out: Tensor,
    d_S: Tensor,
    d_z: Tensor,
) -> Inputs:
    """The gradients of the inputs, from those of what `run_forward` returns; those of tokens are by head of S, and all
    are of S's dtype. Those of the attention's parameters are added to what `d_attention` has in their places.
    """
    heads, wide = run.attention.equation.far_heads, inputs.S.dtype
    d = Inputs(
        torch.empty_like(inputs.q, dtype=wide).unflatten(1, (heads, -1)),
        *(x.new_empty(len(x), heads, *x.shape[2:], dtype=wide) for x in inputs[1:3]),
        *(x.new_zeros(len(x), heads, *x.shape[2:], dtype=wide) for x in inputs[3:]),
    )
    d_out = d_out.unflatten(1, (heads, -1))
    for share in run.shares(inputs):
        part = share.part
        own_d, own_d_out = Inputs(*(x[part] for x in d)), d_out[part]
        sums = d_S[part].flatten(0, 1), d_z[part].flatten(0, 1)
        pieces = run.pieces(len(sums[0]))
        starts, before = before[: len(pieces)], before[len(pieces) :]
        totals = run.learned(d_attention, part.heads)
        ahead_of: Sequence[Tensor] = ()
        for piece, start in zip(reversed(pieces), reversed(starts), strict=True):
            room = run.load(share, piece, *start)
            fill_rows(room.d_out, own_d_out, piece)
            room.d_S.copy_(sums[0])
            room.d_z.copy_(sums[1])
            sums = room.backward(piece, run.attention, d_attention, part.heads)
            own_d.q[..., piece.tokens, :].copy_(room.d_q[..., piece.fill :, :])
            ahead_of = put_slots((own_d.k, own_d.v), piece, (room.d_k, room.d_v), ahead_of)
            own_d.sink_k.add_(room.d.sink_k.view(own_d.sink_k.shape))
            own_d.sink_v.add_(room.d.sink_v.view(own_d.sink_v.shape))
            for name, total in totals.items():
                total.add_(room.d_learned[name])
        own_d.S.copy_(sums[0].view(own_d.S.shape))
        own_d.z.copy_(sums[1].view(own_d.z.shape))
        there = min(run.count, own_d.recent_k.shape[-2])
        for recent, x in zip((own_d.recent_k, own_d.recent_v), ahead_of, strict=True):
            recent[..., recent.shape[-2] - there :, :] = x[..., x.shape[-2] - there :, :]
    for tokens, sinks in ((d.k, d.sink_k), (d.v, d.sink_v)):  # the reverse of `sinks_with`
        first, second = (min(x, sinks.shape[-2]) for x in (run.count, run.count + run.length))
        tokens[..., : second - first, :] += sinks[..., first:second, :]
        sinks[..., first:second, :] = 0
    return d


def put_slots(
    to: Sequence[Tensor], piece: Piece, slots: Sequence[Tensor], ahead_of: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of a piece's slots `[b, h, s, X]` into those of all tokens, `to [b, h, T, X]`, with what the piece
    after it has of its last slots (nothing: there is none). Returns what it has of the slots before its own tokens.
    """
    kept = piece.shape.recent + piece.fill
    for x, more in zip(slots, ahead_of, strict=False):
        x[..., -more.shape[-2] :, :].add_(more)
    for place, x in zip(to, slots, strict=True):
        place = place[..., piece.tokens, :]
        place.copy_(x[..., kept : kept + place.shape[-2], :])
    return [x[..., :kept, :].clone() for x in slots]


def of_heads(gradient: Tensor, x: Tensor) -> Tensor:
    """By head of S `[B, far, ...]`, to that of x, whose heads were repeated, or grouped."""
    if gradient.shape != x.shape:
        gradient = (
            gradient.flatten(1, 2)
            if gradient.dim() > x.dim()
            else gradient.unflatten(1, (x.shape[1], -1)).sum(2)
        )
    return gradient.to(x.dtype)
