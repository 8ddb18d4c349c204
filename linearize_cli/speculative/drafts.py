"""Drafts (proposed token trees), the interface of drafters, and prompt lookup, a drafter without parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHAIN = 8  # the most tokens that lookup drafts


@dataclass(frozen=True)
class Draft:
    """Proposed token trees, one for each row of a batch, all of the same shape.

    Attributes:
        ids: `[B, N]`, the tokens of the N nodes. Node 0, the root, is the row's last token, which is not
            proposed.
        parents: the index of each node's parent, -1 for the root. Parents come before their children.
    """

    ids: Tensor
    parents: Sequence[int]

    def at_most(self, depth: int) -> "Draft":
        """Return the draft without the nodes that are more than `depth` below the root. The root always
        stays.
        """
        nodes, depths = [], []
        for node, parent in enumerate(self.parents):
            depths.append(0 if parent < 0 else depths[parent] + 1)
            if depths[node] <= depth or parent < 0:
                nodes.append(node)
        if len(nodes) == len(depths):
            return self
        place = {node: i for i, node in enumerate([-1, *nodes], -1)}
        return Draft(self.ids[:, nodes], [place[self.parents[node]] for node in nodes])


class Drafter(Protocol):
    """The interface of drafters, which propose tokens for speculative decoding."""

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Propose a token tree for each row.

        Args:
            rows: all tokens of each row so far. The last one becomes the root of the row's tree.
            hidden: `[B, width]`, the last hidden states from which the LM head predicted each row's last
                token.
        """


class NoDraft:
    """A drafter that proposes nothing, for plain decoding. Its token tree is the root alone."""

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Return trees of one node, the last token of each row. `hidden` `[B, width]` gives the device only."""
        return Draft(torch.tensor([row[-1:] for row in rows], device=hidden.device), [-1])


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup: the draft is the text after the latest earlier occurrence of the row's last tokens.

    Attributes:
        length: the most tokens to draft.
        ngram: the number of last tokens to search for. If they do not occur, fewer are tried.
        least: the fewest last tokens to search for.
    """

    length: int = CHAIN
    ngram: int = 3
    least: int = 1

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Return a chain of tokens for each row, as long as the longest continuation found in any row.

        Args:
            rows: all tokens of each row so far.
            hidden: `[B, width]`, from which only the device is read.
        """
        found = [self.continuation(row) for row in rows]
        length = max(map(len, found))
        # Shorter continuations are filled with the row's last token. Any guess will do, because all are verified.
        ids = [
            [row[-1], *more, *row[-1:] * (length - len(more))] for row, more in zip(rows, found, strict=True)
        ]
        return Draft(torch.tensor(ids, device=hidden.device), range(-1, length))

    def continuation(self, row: Sequence[int]) -> Sequence[int]:
        """Return up to `length` tokens after the latest earlier occurrence of the row's last tokens.

        `ngram` last tokens are searched for, then fewer, down to `least`. The result is empty if none occur
        earlier.
        """
        for size in range(min(self.ngram, len(row) - 1), self.least - 1, -1):
            ngram = row[-size:]
            for start in range(len(row) - size - 1, -1, -1):
                if row[start : start + size] == ngram:
                    return row[start + size : start + size + self.length]
        return []
