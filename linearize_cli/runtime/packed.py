"""Attention in rows that pack several documents, which do not see each other."""

from collections.abc import Callable

import torch
from linearize_kernels.equation import LinearAttention
from linearize_kernels.ops.varlen import varlen
from torch import Tensor
from torch.nn.functional import pad

SHORT = 64  # documents shorter than this go together


def document_starts(position_ids: Tensor | None) -> Tensor | None:
    """Return where documents begin, `[B or 1, T]` bool, or None if every row is one document.

    A document begins at a token whose position is not that of the token before it plus one, as in
    transformers (`masking_utils.find_packed_sequence_indices`). In compiled code the result is always None.
    `dispatch.examine` makes rows with several documents run outside of it.

    Args:
        position_ids: `[B or 1, T]`. With None, or positions of another shape (such as those of images), every
            row is one document.
    """
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return None
    jumps = position_ids.diff(dim=-1) != 1
    return pad(jumps, (1, 0), value=True) if bool(jumps.any()) else None


def attend_packed(attention: LinearAttention, starts: Tensor, *heads: Tensor) -> Tensor:
    """Compute the outputs `[B, heads, T, Dv]` of documents without pads, by one call of `varlen` for all
    rows.

    Args:
        starts: `[B, T]` bool, True where a document begins.
        heads: q, k, v `[B, heads or kv, T, D]`.
    """
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in heads)  # [heads, B T, D]
    first = starts.flatten().cpu().nonzero().squeeze(-1)
    out = varlen(attention, q, k, v, torch.cat([first, first.new_tensor([starts.numel()])]))
    return out.unflatten(1, starts.shape).transpose(0, 1)


def attend_apart(
    attend: Callable[..., Tensor], starts: Tensor, there: Tensor | None, *heads: Tensor
) -> Tensor:
    """Compute the outputs of documents that do not see each other.

    Documents become rows with pads on their right. Those of about the same length make one batch, so that at
    most half of a batch is pads (short documents aside).

    Args:
        attend: the attention. It maps q, k, v `[N, heads or kv, T, D]` and a mask `[N, T]` (bool, False for
            pads) or None to `[N, heads, T, Dv]`.
        starts: `[B, T]` bool, True where a document begins.
        there: `[B, T]` bool, False for pads among the tokens. None if there are none and the attention is
            causal, which needs no mask for the pads added on the right.
        heads: q, k, v `[B, heads or kv, T, D]`.

    Returns:
        `[B, heads, T, Dv]`.
    """
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in heads]  # [B T, heads, D]
    first = starts.flatten().nonzero().squeeze(-1)
    lengths = first.diff(append=first.new_tensor([starts.numel()]))
    kinds = lengths.div(SHORT, rounding_mode="floor").float().frexp().exponent  # 0, 1, 2 to 3, 4 to 7, ..
    outputs, slots = [], []
    for kind in kinds.unique():
        length = lengths[kinds == kind, None]
        place = torch.arange(int(length.max()), device=length.device)
        index = first[kinds == kind, None] + place.minimum(length - 1)  # a pad repeats the last token
        own = place < length
        valid = None if there is None else own & there.flatten()[index]
        out = attend(*(x[index].transpose(1, 2) for x in tokens), valid)
        outputs.append(out.transpose(1, 2)[own])
        slots.append(index[own])
    order = torch.cat(slots).argsort()
    return torch.cat(outputs)[order].unflatten(0, starts.shape).transpose(1, 2)
