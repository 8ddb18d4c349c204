"""Perplexity on held-out text, and the outputs on it that are compared with the teacher's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.metrics.predictions import evaluating, predictions
from linearize_cli.models.task import Task


def perplexity(
    model: PreTrainedModel,
    blocks: Tensor,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
    task: Task | None = None,
) -> float:
    """Compute the perplexity of a model on blocks `[N, L]`: exp of the mean negative log-likelihood.

    A causal language model makes L - 1 predictions in each block.

    Args:
        blocks: token ids `[N, L]`.
        batch_size: the most blocks in one forward.
        progress: called with the number of tokens just read.
        task: makes the inputs and answers of a block. None is the task of a causal language model.

    Raises:
        UserError: the logits are not numbers.
    """
    return predictions([model], blocks, task, progress, batch_size).perplexity(0)


@torch.no_grad()
def observations(
    model: nn.Module,
    blocks: Tensor,
    batch_size: int,
    progress: Callable[[int], None],
    task: Task,
) -> Tensor:
    """Return what a model is compared with its teacher by (`Task.observe`), `[N, ...]` in fp32 on the CPU.

    Args:
        blocks: token ids `[N, L]`.
        batch_size: the most blocks in one forward.
        progress: called with the number of tokens just read.
        task: the model's task.
    """
    parts, device = [], next(model.parameters()).device
    with evaluating(model):
        for ids in blocks.split(batch_size):
            parts.append(task.observe(model, ids.to(device)).cpu())
            progress(ids.numel())
    return torch.cat(parts)
