"""Blocks of text, and a batch as a model takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # a label that no answer is right for, as torch's cross entropy has it


@dataclass(frozen=True)
class Blocks:
    """Blocks of text.

    Attributes:
        ids: `[B, L]` int64.
        starts: `[B, L]` bool, where a document begins that the model must read by itself; None: a block is one.
        counted: `[B, L]` bool, the tokens to learn to say; None: all.
    """

    ids: Tensor
    starts: Tensor | None = None
    counted: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Blocks":
        """The same with a function applied to every tensor."""
        return Blocks(*(None if x is None else function(x) for x in (self.ids, self.starts, self.counted)))

    def to(self, device: torch.device | str) -> "Blocks":
        return self.map(lambda x: x.to(device))

    def __getitem__(self, rows: slice) -> "Blocks":
        return self.map(lambda x: x[rows])

    def __len__(self) -> int:
        return len(self.ids)

    def numel(self) -> int:
        """Tokens."""
        return self.ids.numel()


@dataclass(frozen=True)
class Batch:
    """One batch as the model takes it.

    Attributes:
        inputs: the keyword arguments of its forward.
        labels: the right answer at each position of the logits, `[B, T]` int64, IGNORED where there is none;
            None: text alone has no answers.
        counted: the positions of the logits that are learned from, `[B, T]` bool; None: all.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    counted: Tensor | None = None


def causal_batch(blocks: Blocks | Tensor) -> Batch:
    """Each token's answer is the next one of its document."""
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
    """`[B, L]` bool, true where a document begins -> each token's place in its document, int64."""
    slot = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return slot - slot.where(starts, 0).cummax(-1).values
