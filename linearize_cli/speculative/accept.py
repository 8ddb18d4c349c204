"""Which nodes of a tree the target accepts, and the token that follows them.

A rule says of every node whether it may follow its parent, and which token follows it where no child does. The
longest accepted path counts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import TopPLogitsWarper


class Rule(Protocol):
    """Attributes: `lossless`: whether the tokens are distributed as the target's own."""

    lossless: bool

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: `[B, N, vocab]` of the nodes; ids: `[B, N]` their tokens; parents: `[N]`, -1 for the root.

        Returns:
            `[B, N]` bool, whether a node may follow its parent (the root always does), and `[B, N]`, the token after
            each node.
        """


def follows(tokens: Tensor, ids: Tensor, parents: Tensor) -> Tensor:
    """Which nodes are the token `[B, N]` that follows their parent."""
    return (tokens[:, parents.clamp_min(0)] == ids) | (parents < 0)


class Greedy:
    """The most probable token, always."""

    lossless = True

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        tokens = logits.argmax(-1)
        return follows(tokens, ids, parents), tokens


@dataclass
class Sampling:
    """A token is drawn from the target's own distribution at every node, and a child is accepted if it is that token.

    With `top_p`, the distribution is cut to the fewest most probable tokens that hold this mass.

    This is rejection sampling (arXiv 2211.17192, algorithm 1) with a draft that is certain of its tokens: a child x is
    accepted with probability p(x), and where none is, the token is drawn from p without the children.
    """

    temperature: float = 1.0
    generator: torch.Generator | None = None
    top_p: float = 1.0
    lossless = True

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.draw(logits)
        return follows(tokens, ids, parents), tokens

    def draw(self, logits: Tensor) -> Tensor:
        """`[B, N, vocab] -> [B, N]`, by a generator of the CPU, so that no device changes the draws."""
        scores = (logits.double() / self.temperature).flatten(0, 1)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator)
        return drawn.view(logits.shape[:2]).to(logits.device)


@dataclass
class Typical(Sampling):
    """Typical acceptance (Medusa, arXiv 2401.10774, sec. 2.3.1): a child is accepted if the target's probability of it
    is above `min(epsilon, delta · exp(-entropy))`. The tokens are NOT distributed as the target's.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    lossless = False

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        p = (logits.double() / self.temperature).softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        bound = (self.delta * (-entropy).exp()).clamp_max(self.epsilon)
        before = parents.clamp_min(0)
        probable = p[:, before].gather(-1, ids.clamp_min(0)[..., None]).squeeze(-1) > bound[:, before]
        return probable | (parents < 0), self.draw(logits)


def longest(accepted: Tensor, visible: Tensor) -> Tensor:
    """`[B]`: the deepest node of each row that is accepted with all its ancestors, the first of equals; accepted
    `[B, N]`, visible `[N, N]` as in `Shape`.
    """
    reached = (accepted[:, None, :] | ~visible).all(-1)
    return (reached * visible.sum(-1)).argmax(-1)
