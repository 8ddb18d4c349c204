"""What every conversion proves before it is saved: the forms of the model agree."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from linearize_cli.measure.equivalence import forward, unpadded

# Largest logit difference allowed, relative to the largest logit: about 200 roundings of fp32, and what many
# layers of rounding add up to in the narrow types.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def tolerance(logits: Tensor) -> float:
    return TOLERANCE[logits.dtype] * max(1.0, logits.abs().max().item())


@torch.no_grad()
def full_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`[B, L] -> [B, L, vocab]` in one forward without a cache."""
    return forward(model, ids)


@torch.no_grad()
def incremental_difference(model: PreTrainedModel, ids: Tensor, singles: int = 32) -> float:
    """Largest logit difference between one forward and an uneven prefill followed by single tokens."""
    expected, cache, first, outputs = full_logits(model, ids), DynamicCache(config=model.config), 0, []
    length = ids.shape[1]
    pieces = [max(1, (length - singles) * 2 // 3), max(1, (length - singles) // 3)]
    pieces = [p for p in pieces if p < length] if length > singles else []
    for size in [*pieces, *[1] * (length - sum(pieces))]:
        part = ids[:, first : first + size]
        outputs.append(forward(model, part, cache))
        first += size
    return (torch.cat(outputs, 1) - expected).abs().max().item()


@torch.no_grad()
def padded_difference(model: PreTrainedModel, ids: Tensor, pads: int = 11) -> float:
    """Largest logit difference between a row behind pads, in one forward, and `unpadded`."""
    row = ids[0, pads:]
    padded = torch.cat([row[:1].expand(pads), row])[None]
    mask = (torch.arange(padded.shape[1], device=ids.device) >= pads)[None].long()
    return (forward(model, padded, mask=mask)[0, pads:] - unpadded(model, row, pads)).abs().max().item()
