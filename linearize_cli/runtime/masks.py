"""Attention masks of transformers: which tokens are pads, and where documents begin.

A linear-attention layer keeps causality itself and sees all tokens of its document. So of a mask it takes pads and
documents that follow one another in a row; any other mask is refused.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

HIDDEN = -9_999.0  # an additive mask hides a token by this or less: by -1e4, -1e9 or the lowest number
exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 cannot tell


def is_compact(mask: Tensor) -> bool:
    """Return whether a mask tells only pads or documents: `[B, T]`, `dispatch.compact_mask` or `document_mask`."""
    return mask.dim() == 2 or (mask.dtype in (torch.int8, torch.int32) and mask.shape[-1] == 1)


def document_mask(starts: Tensor) -> Tensor:
    """Return a mask of documents by positions, `[B, 1, T, 1]` int32: each token's document, counted from 1."""
    return starts.cumsum(-1, dtype=torch.int32)[:, None, :, None]


def is_document_mask(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 1


def starts_of(mask: Tensor | None) -> Tensor | None:
    """Return where documents begin in a `document_mask`, `[B, T]` bool, or None for another mask."""
    if mask is None or not is_document_mask(mask):
        return None
    return pad(mask[:, 0, :, 0].diff(dim=-1) != 0, (1, 0), value=True)


def valid_tokens(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """Return which of the T new tokens are not pads, `[B, T]` bool, or None if there are no pads.

    In a 4-D mask a token is a pad if it may not see itself.
    """
    if mask is None:
        return None
    start = first_column(mask, length, past)
    if mask.dim() == 2:
        return unless_all(mask[:, start : start + length].bool())
    if is_compact(mask):
        return mask[:, 0, :, 0].bool() if mask.dtype == torch.int8 else None
    seen = shown(mask[:, 0])
    if seen.shape[1] == 1:  # one row for all queries
        valid = seen[:, 0, start : start + length].expand(batch, -1)
    else:
        valid = seen[:, -length:, start:].diagonal(dim1=1, dim2=2)[:, :length].expand(batch, -1)
    return unless_all(valid)


def unless_all(valid: Tensor) -> Tensor | None:
    """Return None instead of a mask that is True everywhere. Compiled code cannot read values, and keeps the mask."""
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid


def shown(mask: Tensor) -> Tensor:
    """Convert a boolean or additive mask to a boolean one: True where a token may be seen."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def first_column(mask: Tensor, length: int, past: int) -> int:
    """Return the column of the first new token."""
    return past if mask.shape[-1] >= past + length else mask.shape[-1] - length


def masked_documents(
    mask: Tensor,
    length: int,
    past: int,
    count: Tensor | None,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Return where documents begin in a 4-D mask, `[B, T]` bool, or None if each row is one document.

    Args:
        mask: `[B, heads or 1, T, N]`, boolean or additive.
        past: tokens in the cache, pads counted.
        count: `[B]`, tokens in the cache that are no pads; None without a cache.
        window: size of the base model's sliding window, or None.

    Raises:
        ValueError: the mask is of another kind.
    """
    if mask.shape[1] > 1 and not torch.equal(mask[:, :1].expand_as(mask), mask):
        raise ValueError("a linear-attention layer takes one attention mask for all heads")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= HIDDEN)).all()):
        raise ValueError(
            "a linear-attention layer cannot add the biases in this attention mask to its scores"
        )
    seen, start = shown(mask[:, 0, -length:]), first_column(mask, length, past)
    if seen.shape[1] < length:  # one row for all queries hides pads alone
        return None
    own, rest = seen[..., start : start + length], seen[..., start + length :]
    there = own.diagonal(dim1=1, dim2=2)  # no pads
    if past and start == past and window is None:
        sees_all = seen[..., :past].sum(-1) == (past if count is None else count[:, None])
        if not bool((sees_all | ~there).all()):
            raise ValueError(
                "the attention mask hides tokens that are in the cache, and the state of a linear-attention layer "
                "holds them all: begin with an empty cache"
            )
    if length == 1 and not rest.shape[-1]:  # a single token separates nothing
        return None
    starts = first_tokens(own, there, window)
    distance = torch.arange(length, device=mask.device)
    distance = distance[:, None] - distance
    number = starts.cumsum(-1)
    expected = (number[:, :, None] == number[:, None, :]) & there[:, None, :]
    if causal:
        expected = expected & (distance >= 0)
    known = [expected] if window is None else [expected, expected & (distance.abs() < window)]
    if bool((rest.any(-1) & there).any()) or not any(same(own, x, there) for x in known):
        raise ValueError(
            "a linear-attention layer cannot follow this 4-D attention mask: it takes pads, and documents that follow "
            "one another, whose tokens see all of their document (in a causal model: all before them)"
        )
    apart = bool((starts.sum(-1) > 1).any())
    return pad(starts[:, 1:], (1, 0), value=True) if apart else None  # pads on the left are apart


def first_tokens(own: Tensor, there: Tensor, window: int | None) -> Tensor:
    """Return the tokens that begin a document, `[B, T]`: those that do not see the valid token before them.

    Args:
        own: `[B, T, T]` bool, what the tokens see of each other; there: `[B, T]` bool, false for pads.
        window: size of the sliding window, or None. Tokens at this distance or more are ignored.
    """
    slot = torch.arange(own.shape[-1], device=own.device)
    latest = torch.where(there, slot, -1).cummax(-1).values
    previous = pad(latest[:, :-1], (1, 0), value=-1)
    sees_previous = own.gather(2, previous.clamp_min(0)[..., None]).squeeze(-1)
    near = slot - previous < (window or own.shape[-1] + 1)
    return there & ((previous < 0) | (near & ~sees_previous))


def same(actual: Tensor, expected: Tensor, there: Tensor) -> bool:
    """Return whether two masks agree for all tokens that are not pads."""
    return not bool(((actual != expected).any(-1) & there).any())
