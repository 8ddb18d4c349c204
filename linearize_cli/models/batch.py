"""Blocks of tokens, and the batches that a model takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # a label that torch's cross entropy ignores


@dataclass(frozen=True)
class Blocks:
    """Blocks of L tokens, cut from text.

    Attributes:
        ids: `[B, L]` int64.
        starts: `[B, L]` bool, True at the first token of each document. Attention then stays within a
            document (document masking). None: attention may cross from one document of a block into the next.
        counted: `[B, L]` bool, True at the tokens to train on. None means all tokens.
    """

    ids: Tensor
    starts: Tensor | None = None
    counted: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Blocks":
        """Return the blocks with a function applied to each tensor that is not None."""
        return Blocks(*(None if x is None else function(x) for x in (self.ids, self.starts, self.counted)))

    def to(self, device: torch.device | str) -> "Blocks":
        return self.map(lambda x: x.to(device))

    def __getitem__(self, rows: slice) -> "Blocks":
        return self.map(lambda x: x[rows])

    def __len__(self) -> int:
        return len(self.ids)

    def numel(self) -> int:
        """Return the number of tokens."""
        return self.ids.numel()


@dataclass(frozen=True)
class Batch:
    """A batch in the form that a model takes.

    Attributes:
        inputs: the keyword arguments of the model's `forward`.
        labels: `[B, T]` int64, the correct token at each position of the logits, or IGNORED. None if the task
            has no labels.
        counted: `[B, T]` bool, the positions of the logits to train on. None means all positions.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    counted: Tensor | None = None


def causal_batch(blocks: Blocks | Tensor) -> Batch:
    """Return the batch of a causal language model. The label of each token is the next token of its document.

    The labels are shifted already: `labels[b, t]` is `ids[b, t + 1]`, or IGNORED.

    Args:
        blocks: blocks of token ids. A plain tensor `[B, L]` means that each row is one document and all its
            tokens are trained on.
    """
    if not isinstance(blocks, Blocks):
        blocks = Blocks(blocks)
    ids, starts, counted = blocks.ids, blocks.starts, blocks.counted
    inputs, labels = {"input_ids": ids, "use_cache": False}, pad(ids[:, 1:], (0, 1), value=IGNORED)
    if starts is not None:
        inputs["position_ids"] = document_positions(starts)
        labels = labels.masked_fill(pad(starts[:, 1:], (0, 1)), IGNORED)
    if counted is not None:
        labels = labels.masked_fill(~pad(counted[:, 1:], (0, 1)), IGNORED)
    return Batch(inputs, labels, None if counted is None else labels != IGNORED)


def document_positions(starts: Tensor) -> Tensor:
    """Return the position of each token in its document, `[B, L]` int64.

    Args:
        starts: `[B, L]` bool, True at the first token of each document.
    """
    slot = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return slot - slot.where(starts, 0).cummax(-1).values
