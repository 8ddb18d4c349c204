"""The sliding form on a CPU: one lane after the other, and of each one piece after the other, go all the way from their
features to their outputs in memory that the CPU's cache holds. Of a piece only S and z before it are kept: the backward
makes the rest again, from the last piece to the first.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from linearize_kernels.attention import LinearAttention
from linearize_kernels.combine import pull_per_head
from linearize_kernels.parts import Part, of_queries
from linearize_kernels.scratch import SCRATCH
from linearize_kernels.sliding import backward, forward
from linearize_kernels.sliding_lane import Gradients, Lane
from linearize_kernels.sliding_run import Inputs, Made, Piece, Run, fill_rows
from linearize_kernels.tiles import by_head, led


def sliding_pieces(run: Run, inputs: Inputs, place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[B, heads, T, Dv]` in q's dtype, and S and z after all tokens. place: where the outputs go; not with
    gradients.
    """
    with torch.autocast(inputs.q.device.type, enabled=False):  # it would narrow some products, and not others
        if torch.is_grad_enabled():
            run = replace(run, attention=plain(run.attention))
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
        inputs, rest, wanted = Inputs(*saved[:count]), saved[count:], ctx.needs_input_grad[1 + count :]
        held, sums = rest[: len(ctx.names)], rest[len(ctx.names) :]
        own = {name: x.detach() for name, x in zip(ctx.names, held, strict=True)}
        learned = dict(zip(ctx.names, wanted, strict=False))
        d_own = {
            name: torch.zeros_like(own[name].requires_grad_(), dtype=inputs.S.dtype) if learns else None
            for name, learns in learned.items()
        }
        run = replace(ctx.run, attention=with_tensors(ctx.run.attention, own), rooms={})
        d_attention = with_tensors(ctx.run.attention, own | d_own)
        before = list(zip(sums[::2], sums[1::2], strict=True))
        with torch.autocast(inputs.q.device.type, enabled=False):
            d = run_backward(run, inputs, before, d_attention, d_out, d_S, d_z)
        of_inputs = (of_heads(x, to) for x, to in zip(d, inputs, strict=True))
        return None, *of_inputs, *(None if x is None else x.to(own[name].dtype) for name, x in d_own.items())


def parameters_of(attention: nn.Module) -> dict[str, Tensor]:
    return dict(attention.named_parameters(remove_duplicate=False))


def buffers_of(attention: nn.Module) -> dict[str, Tensor]:
    return dict(attention.named_buffers(remove_duplicate=False))


def plain(module: nn.Module) -> nn.Module:
    """The same module with what its parametrizations make as its parameters, which are all there is to find gradients
    of then; itself, where it has none.
    """
    children = {name: None if x is None else plain(x) for name, x in module._modules.items()}
    made = {}
    if is_parametrized(module):
        made = {name: getattr(module, name) for name in children.pop("parametrizations")}
    elif all(x is y for x, y in zip(children.values(), module._modules.values(), strict=True)):
        return module
    other = object.__new__(type_before_parametrizations(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_parameters"], other.__dict__["_modules"] = module._parameters | made, children
    return other


def with_tensors(module: nn.Module, held: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """The same module with other parameters and buffers. Not by `copy`, which FSDP refuses, nor by `functional_call`,
    which lets other threads see them.
    """
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        other.__dict__[kind] = {name: None if x is None else held[prefix + name] for name, x in own.items()}
    other.__dict__["_modules"] = {
        name: None if child is None else with_tensors(child, held, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return other


def run_forward(run: Run, inputs: Inputs, out: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Writes the outputs `[B, heads, T, Dv]`, and returns S and z after all tokens, and before each piece."""
    S, z, before = torch.empty_like(inputs.S), torch.empty_like(inputs.z), []
    out = out.unflatten(1, (S.shape[1], -1))
    for share in run.shares(inputs):
        part, sums = share.part, (share.beside.S, share.beside.z)
        for piece in run.pieces(len(sums[0])):
            before.append(sums)
            lane, tokens, _ = run.load(share, piece, *sums)
            place, size = out[part][..., piece.tokens, :], (*lane.q.shape[:3], out.shape[-1])
            whole = place.is_contiguous() and place.shape[2] == 1 and place.numel() == math.prod(size)
            direct = whole and place.dtype == lane.q.dtype
            rows = place.view(size) if direct else SCRATCH.take("rows", lane.q, *size)
            with torch.inference_mode():  # autograd counts no versions of what is written in place
                sums = forward(piece.shape, lane, tokens, rows)
            sums = [x.clone() for x in sums]
            if not direct:
                rows = by_head(rows, piece.shape).view(*place.shape[:3], -1, out.shape[-1])
                place.copy_(rows[..., piece.fill :, :])
        S[part], z[part] = (x.view(to[part].shape) for x, to in zip(sums, (S, z), strict=True))
    run.rooms.clear()
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
        own_d = Inputs(*(x[part] for x in d))
        sums = d_S[part].flatten(0, 1), d_z[part].flatten(0, 1)
        pieces = run.pieces(len(sums[0]))
        starts, before = before[: len(pieces)], before[len(pieces) :]
        beside, ahead_of = share.beside, ()
        conv, *sinks = (
            None if x is None else torch.zeros_like(x) for x in (beside.conv, beside.sink_k, beside.sink_v)
        )
        for piece, start in zip(reversed(pieces), reversed(starts), strict=True):
            lane, tokens, made = run.load(share, piece, *start, tracked=True)
            of_lane = gradients_in(lane, piece, d_out.shape[-1])
            fill_rows(of_lane.out, led(d_out[part][..., piece.tokens, :].to(wide), piece.fill), piece.shape)
            of_lane.conv, of_lane.sink_k, of_lane.sink_v = conv, *sinks
            with torch.inference_mode():
                sums = backward(piece.shape, lane, tokens, of_lane, *sums)
            of_q, of_k = through(made, of_lane, part, piece, run.attention, d_attention)
            own_d.q[..., piece.tokens, :] = of_q[..., piece.fill :, :]
            slots = of_k, of_lane.v.view(*of_k.shape[:-1], -1)
            ahead_of = put_slots((own_d.k, own_d.v), piece, slots, ahead_of)
        for to, x in zip((own_d.S, own_d.z, own_d.sink_k, own_d.sink_v), (*sums, *sinks), strict=True):
            to.copy_(x.view(to.shape))
        if d_attention.conv is not None:
            own_conv = of_queries(d_attention, d_attention.conv, part.heads)
            own_conv += conv.unflatten(0, own_d.S.shape[:2]).sum(0)
        there = min(run.count, own_d.recent_k.shape[-2])
        for recent, x in zip((own_d.recent_k, own_d.recent_v), ahead_of, strict=True):
            recent[..., recent.shape[-2] - there :, :] = x[..., x.shape[-2] - there :, :]
    for tokens, sinks in ((d.k, d.sink_k), (d.v, d.sink_v)):  # the reverse of `sinks_with`
        first, second = (min(x, sinks.shape[-2]) for x in (run.count, run.count + run.length))
        tokens[..., : second - first, :] += sinks[..., first:second, :]
        sinks[..., first:second, :] = 0
    return d


def gradients_in(lane: Lane, piece: Piece, value_dim: int) -> Gradients:
    """Room for those of what lies in a lane, as long as it lasts."""
    if lane.gradients is None:
        out = SCRATCH.take("d_out", lane.q, *lane.q.shape[:3], value_dim)
        lane.gradients = Gradients(piece.shape, lane, out, SCRATCH.take)
    return lane.gradients


def put_slots(
    to: Sequence[Tensor], piece: Piece, slots: Sequence[Tensor], ahead_of: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of a piece's slots `[b, h, s, X]` into those of all tokens, `to [b, h, T, X]`, with what the piece
    after it has of its last slots (nothing: there is none). Returns what it has of the slots before its own tokens.
    """
    kept = piece.shape.recent + piece.fill
    for x, more in zip(slots, ahead_of, strict=False):
        x[..., -more.shape[-2] :, :] += more
    for place, x in zip(to, slots, strict=True):
        place = place[..., piece.tokens, :]
        place.copy_(x[..., kept : kept + place.shape[-2], :])
    return [x[..., :kept, :].clone() for x in slots]


def through(
    made: Made,
    of_lane: Gradients,
    part: Part,
    piece: Piece,
    attention: LinearAttention,
    d_attention: LinearAttention,
) -> tuple[Tensor, Tensor]:
    """The gradients of a piece's q and k, with what they are by way of all that was made of them; adds those of the
    parameters.
    """
    b, h, g = made.q.shape[:3]
    d_q, d_k = by_head(of_lane.q, piece.shape).contiguous().view(made.q.shape), of_lane.k.view(made.k.shape)
    if made.pull_q is not None:
        made.pull_q(by_head(of_lane.phi_q, piece.shape).view(*d_q.shape[:-1], -1), d_q, d_attention.far)
        made.pull_k(of_lane.phi_k.view(*d_k.shape[:-1], -1), d_k, d_attention.far)
        mix, d_mix = (
            None if x.combine.mix is None else of_queries(x, x.combine.mix, part.heads)
            for x in (attention, d_attention)
        )
        if mix is not None:
            pull_per_head(by_head(of_lane.mix, piece.shape).view(b, h, g, -1), made.q, mix, d_q, d_mix)
    return d_q, d_k


def of_heads(gradient: Tensor, x: Tensor) -> Tensor:
    """By head of S `[B, far, ...]`, to that of x, whose heads were repeated, or grouped."""
    if gradient.shape != x.shape:
        gradient = (
            gradient.flatten(1, 2)
            if gradient.dim() > x.dim()
            else gradient.unflatten(1, (x.shape[1], -1)).sum(2)
        )
    return gradient.to(x.dtype)
