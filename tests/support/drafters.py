"""Drafters that know what the target will say, and get so much of it right as a test wants."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize_cli.speculative.drafts import Draft


@dataclass
class Oracle:
    """Random trees with the right token at a node with probability `right`, any wrong one else.

    Attributes:
        known: of each row its prompt and all that the target says.
        trees: that one is chosen from at random at each step.
    """

    known: Sequence[Sequence[int]]
    right: float
    trees: Sequence[Sequence[int]]
    vocabulary: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        parents = list(self.rng.choice(self.trees))
        return Draft(
            torch.tensor([self.nodes(*pair, parents) for pair in zip(rows, self.known, strict=True)]), parents
        )

    def nodes(self, row: Sequence[int], known: Sequence[int], parents: Sequence[int]) -> list[int]:
        depths, ids = [0], [row[-1]]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
            place = len(row) - 1 + depths[-1]
            truth = known[place] if place < len(known) else 0
            wrong = (truth + self.rng.randrange(1, self.vocabulary)) % self.vocabulary
            ids.append(truth if self.rng.random() < self.right else wrong)
        return ids
