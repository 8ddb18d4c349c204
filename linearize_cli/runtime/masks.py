"""Attention masks of transformers: which tokens are pads, and where documents begin.

A linear-attention layer is causal by itself, and its tokens see all earlier tokens of their document. So it
reads only two things from a mask: pads, and documents that follow one another in a row. Any other mask is
refused.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

HIDDEN = -9_999.0  # an additive mask hides a token by this or less: by -1e4, -1e9 or the lowest number
exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 cannot tell


def is_compact(mask: Tensor) -> bool:
    """Return True if a mask says something about each token only, not about each pair of tokens.

    Such masks are `[B, T]`, and `[B, 1, T, 1]` int8 (pads) or int32 (documents).
    """
    return mask.dim() == 2 or (mask.dtype in (torch.int8, torch.int32) and mask.shape[-1] == 1)


def document_mask(starts: Tensor) -> Tensor:
    """Return a mask of packed documents, `[B, 1, T, 1]` int32: the number of each token's document, counted
    from 1.

    Args:
        starts: `[B, T]` bool, True where a document begins.
    """
    return starts.cumsum(-1, dtype=torch.int32)[:, None, :, None]


def is_document_mask(mask: Tensor | None) -> bool:
    """Return True if a mask was made by `document_mask`."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 1


def starts_of(mask: Tensor | None) -> Tensor | None:
    """Return where documents begin, `[B, T]` bool, if the mask was made by `document_mask`. Return None for
    other masks.
    """
    if mask is None or not is_document_mask(mask):
        return None
    return pad(mask[:, 0, :, 0].diff(dim=-1) != 0, (1, 0), value=True)


def valid_tokens(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """Return which of the T new tokens are not pads, `[B, T]` bool, or None if there are no pads.

    Args:
        mask: the attention mask in any form, or None. In a 4-D mask a token that does not see itself is a
            pad.
        batch: B.
        length: T.
        past: the number of tokens in the cache, with pads.
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
    """Return a bool mask, or None if it is True everywhere. Compiled code cannot read values, so there it is
    always returned.
    """
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid


def shown(mask: Tensor) -> Tensor:
    """Convert an attention mask, boolean or additive, to a boolean one: True where a query may see a key."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def first_column(mask: Tensor, length: int, past: int) -> int:
    """Return the column of an attention mask that belongs to the first new token.

    Args:
        mask: `[..., N]`. Its columns are the tokens in the cache and the new ones, or the new ones only.
        length: the number of new tokens.
        past: the number of tokens in the cache.
    """
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
        length: T, the number of new tokens.
        past: the number of tokens in the cache, with pads.
        count: `[B]`, the number of tokens in the cache without pads. None without a cache.
        causal: True if tokens do not see later ones.
        window: the size of the base model's sliding window, or None.

    Raises:
        ValueError: the mask hides more than pads, other documents and later tokens, or has biases, or differs
            by head.
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
    """Find where documents begin in a mask: at the tokens that do not see the token before them, `[B, T]`
    bool.

    Pads are skipped and begin no document.

    Args:
        own: `[B, T, T]` bool, True where the mask lets token i see token j.
        there: `[B, T]` bool, False for pads.
        window: the size of the sliding window, or None. A token before which there are only pads within the
            window is taken to continue its document.
    """
    slot = torch.arange(own.shape[-1], device=own.device)
    latest = torch.where(there, slot, -1).cummax(-1).values
    previous = pad(latest[:, :-1], (1, 0), value=-1)
    sees_previous = own.gather(2, previous.clamp_min(0)[..., None]).squeeze(-1)
    near = slot - previous < (window or own.shape[-1] + 1)
    return there & ((previous < 0) | (near & ~sees_previous))


def same(actual: Tensor, expected: Tensor, there: Tensor) -> bool:
    """Return True if two masks `[B, T, T]` agree in the rows of all tokens that are not pads (`there`,
    `[B, T]`).
    """
    return not bool(((actual != expected).any(-1) & there).any())
