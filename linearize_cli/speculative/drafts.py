"""What a drafter proposes, and prompt lookup, the drafter that needs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHAIN = 8  # tokens that lookup drafts at most


@dataclass(frozen=True)
class Draft:
    """A token tree for every row, of one topology.

    Attributes:
        ids: `[B, N]`, node 0 being the last token of the row so far.
        parents: of the N nodes, -1 for node 0; parents come before their children.
    """

    ids: Tensor
    parents: Sequence[int]

    def at_most(self, depth: int) -> "Draft":
        """Without the nodes that are further than `depth` below the root; the root stays."""
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
    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """
        Args:
            rows: all tokens of each row so far; the last one is the root of its tree.
            hidden: `[B, width]`, what the model's head made that last token of.
        """


class NoDraft:
    """Plain decoding: the tree is its root."""

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        return Draft(torch.tensor([row[-1:] for row in rows], device=hidden.device), [-1])


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup: the tokens that followed the latest earlier occurrence of the row's last tokens.

    Attributes:
        length: tokens drafted at most.
        ngram: last tokens to look for, fewer where so many do not occur; `least` at least.
    """

    length: int = CHAIN
    ngram: int = 3
    least: int = 1

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        found = [self.continuation(row) for row in rows]
        length = max(map(len, found))
        # A row with fewer goes on with its last token: a guess as good as any, and verified like any.
        ids = [
            [row[-1], *more, *row[-1:] * (length - len(more))] for row, more in zip(rows, found, strict=True)
        ]
        return Draft(torch.tensor(ids, device=hidden.device), range(-1, length))

    def continuation(self, row: Sequence[int]) -> Sequence[int]:
        for size in range(min(self.ngram, len(row) - 1), self.least - 1, -1):
            ngram = row[-size:]
            for start in range(len(row) - size - 1, -1, -1):
                if row[start : start + size] == ngram:
                    return row[start + size : start + size + self.length]
        return []
