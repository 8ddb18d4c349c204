"""Perplexity, as the contract defines it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@torch.no_grad()
def perplexity(
    model: nn.Module,
    blocks: Tensor,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> float:
    """exp of the mean negative log-likelihood over blocks `[N, L]`: L - 1 predictions each.

    Args:
        progress: called with the number of tokens just read.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for ids in blocks.split(batch_size):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.double().item(), count + ids[:, 1:].numel()
        progress(ids.numel())
    model.train(was_training)
    return math.exp(total / count)
