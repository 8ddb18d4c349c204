"""How well a model predicts held-out text, as the contract defines it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linearize_cli.tasks import IGNORED, Task, causal_batch


@torch.no_grad()
def perplexity(
    model: nn.Module,
    blocks: Tensor,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
    task: Task | None = None,
) -> float:
    """exp of the mean negative log-likelihood of the right answers over blocks `[N, L]`: for a causal language
    model L - 1 predictions each.

    Args:
        progress: called with the number of tokens just read.
        task: what makes inputs and answers of a block; None: a causal language model's.
    """
    batch_of, total, count = task.batch if task else causal_batch, 0.0, 0
    for ids in evaluated(model, blocks, batch_size, progress):
        batch = batch_of(ids)
        logits = model(**batch.inputs).logits.float()
        loss = cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total, count = total + loss.double().item(), count + int((batch.labels != IGNORED).sum())
    return math.exp(total / count)


@torch.no_grad()
def log_probabilities(
    model: nn.Module,
    blocks: Tensor,
    batch_size: int,
    progress: Callable[[int], None],
    task: Task,
) -> Tensor:
    """What a classifier makes of each block: `[N, L]` -> `[N, classes]` fp32, on the CPU."""
    parts = evaluated(model, blocks, batch_size, progress)
    return torch.cat([model(**task.batch(ids).inputs).logits.float().log_softmax(-1).cpu() for ids in parts])


def evaluated(
    model: nn.Module, blocks: Tensor, batch_size: int, progress: Callable[[int], None]
) -> Iterator[Tensor]:
    """The blocks in batches on the model's device, the model in evaluation mode meanwhile."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for ids in blocks.split(batch_size):
            yield ids.to(device)
            progress(ids.numel())
    finally:
        model.train(training)
