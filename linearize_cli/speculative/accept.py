"""Acceptance rules of speculative decoding.

A drafter proposes a token tree, and the target (the model whose text is generated) computes the logits of its
nodes. A rule decides for every node whether its token may follow its parent. It also chooses the token that
follows each node if none of its children is accepted. The longest accepted path is kept.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import TopPLogitsWarper


class Rule(Protocol):
    """An acceptance rule of speculative decoding: it decides which drafted tokens are kept.

    Attributes:
        lossless: True if the generated tokens follow the target's own distribution, as without a drafter.
    """

    lossless: bool

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Decide which nodes are accepted.

        Args:
            logits: `[B, N, vocab]`, the target's logits of the nodes.
            ids: `[B, N]`, the nodes' tokens.
            parents: `[N]`, -1 for the root.

        Returns:
            `[B, N]` bool, True where a node may follow its parent (always for the root), and `[B, N]`, the
            token that follows each node if no child is accepted.
        """


def follows(tokens: Tensor, ids: Tensor, parents: Tensor) -> Tensor:
    """Return `[B, N]` bool, True for the root and for nodes whose token is the one that follows their parent.

    Args:
        tokens: `[B, N]`, the token that follows each node.
        ids: `[B, N]`, the nodes' own tokens.
        parents: `[N]`, -1 for the root.
    """
    return (tokens[:, parents.clamp_min(0)] == ids) | (parents < 0)


class Greedy:
    """The rule of greedy decoding: a child is accepted if its token has the largest logit at its parent."""

    lossless = True

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Accept the children whose token has the largest logit at their parent.

        Args:
            logits: `[B, N, vocab]`, the target's logits of the nodes.
            ids: `[B, N]`, the nodes' tokens.
            parents: `[N]`, the index of each node's parent, -1 for the root.

        Returns:
            `[B, N]` bool, True for accepted nodes and the root, and `[B, N]`, the token that follows each
            node if no child is accepted.
        """
        tokens = logits.argmax(-1)
        return follows(tokens, ids, parents), tokens


@dataclass
class Sampling:
    """The rule of sampling: at every node a token is sampled from the target. A child with this token is
    accepted.

    This is rejection sampling (arXiv 2211.17192, algorithm 1) with a draft distribution that gives the
    drafted token probability 1. With the target's distribution p, a child with token x is accepted with
    probability p(x). If no child is accepted, the next token follows p without the children's tokens.

    Attributes:
        temperature: the logits are divided by it.
        generator: a random generator on the CPU, or None for torch's global one.
        top_p: sample from the smallest set of most probable tokens whose probabilities sum to this. 1 keeps
            all tokens.
    """

    temperature: float = 1.0
    generator: torch.Generator | None = None
    top_p: float = 1.0
    lossless = True

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Accept the children whose token is the one sampled at their parent.

        Args:
            logits: `[B, N, vocab]`, the target's logits of the nodes.
            ids: `[B, N]`, the nodes' tokens.
            parents: `[N]`, the index of each node's parent, -1 for the root.

        Returns:
            `[B, N]` bool, True for accepted nodes and the root, and `[B, N]`, the token that follows each
            node if no child is accepted.
        """
        tokens = self.draw(logits)
        return follows(tokens, ids, parents), tokens

    def draw(self, logits: Tensor) -> Tensor:
        """Sample tokens `[B, N]` from logits `[B, N, vocab]`, on the CPU so that all devices sample the same."""
        scores = (logits.double() / self.temperature).flatten(0, 1)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator)
        return drawn.view(logits.shape[:2]).to(logits.device)


@dataclass
class Typical(Sampling):
    """The rule of typical acceptance (Medusa, arXiv 2401.10774, sec. 2.3.1).

    A child is accepted if its probability under the target is above `min(epsilon, delta * exp(-entropy))`,
    with the entropy of the target's distribution at its parent. So the generated tokens do NOT follow the
    target's distribution. If no child is accepted, the next token is sampled.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    lossless = False

    def __call__(self, logits: Tensor, ids: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Accept the children that are probable enough under the target's distribution.

        Args:
            logits: `[B, N, vocab]`, the target's logits of the nodes.
            ids: `[B, N]`, the nodes' tokens.
            parents: `[N]`, the index of each node's parent, -1 for the root.

        Returns:
            `[B, N]` bool, True for accepted nodes and the root, and `[B, N]`, the token that follows each
            node if no child is accepted.
        """
        p = (logits.double() / self.temperature).softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        bound = (self.delta * (-entropy).exp()).clamp_max(self.epsilon)
        before = parents.clamp_min(0)
        probable = p[:, before].gather(-1, ids.clamp_min(0)[..., None]).squeeze(-1) > bound[:, before]
        return probable | (parents < 0), self.draw(logits)


def longest(accepted: Tensor, visible: Tensor) -> Tensor:
    """Return the deepest node `[B]` of each row that is accepted with all its ancestors. Ties go to the first
    node.

    Args:
        accepted: `[B, N]` bool.
        visible: `[N, N]` bool, `visible[i, j]` is True if node j is node i or an ancestor of it.
    """
    reached = (accepted[:, None, :] | ~visible).all(-1)
    return (reached * visible.sum(-1)).argmax(-1)
