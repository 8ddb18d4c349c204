"""Distances of a student's outputs from its teacher's, and the pooling of hidden states into embeddings."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return KL(teacher ‖ student), averaged over all tokens.

    Args:
        teacher: log-probabilities `[..., vocab]`.
        logits: the student's logits `[..., vocab]`.
    """
    return total_divergence(teacher, logits) / logits[..., 0].numel()


def total_divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return KL(teacher ‖ student), summed over all tokens.

    Args:
        teacher: log-probabilities `[..., vocab]`.
        logits: the student's logits `[..., vocab]`.
    """
    return kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")


def cosine_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 1 - cosine of two embeddings, averaged over all texts.

    Args:
        teacher, student: embeddings `[..., width]`.
    """
    return 1 - cosine_similarity(teacher, student, dim=-1).mean()


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens of each text, `[B, width]`.

    Args:
        states: hidden states `[B, T, width]`.
        mask: `[B, T]`, 0 at pads.
    """
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden state of the first token of each text, `[B, width]`, usually [CLS].

    Args:
        states: hidden states `[B, T, width]`.
        mask: `[B, T]`, 0 at pads. Pads must be on the right.
    """
    return states[:, 0]


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return the embedding of each text, `[B, width]`.

    Args:
        states: hidden states `[B, T, width]`.
        mask: `[B, T]`, 0 at pads. None: there are no pads.
        pooling: `mean` over the tokens of a text, or `cls` for its first token.
    """
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    return {"mean": mean_of_tokens, "cls": first_token}[pooling](states, mask)
