"""Attention transfer: every linear layer learns its softmax layer's output on the teacher's own hidden states."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from linearize_cli.recover.distill import relative_error
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.tasks import Batch

TRANSFER = "linearize_transfer"


def softmax_attention(module: nn.Module, native: str):
    """The attention function that the base model runs in this module."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(native, eager)


@contextmanager
def transferring(model: PreTrainedModel, native: str) -> Iterator[dict[str, Tensor]]:
    """While open, a forward is the softmax teacher's, and leaves each layer's loss in the yielded dict.

    The loss is the squared error of the linear output against the softmax output, relative to the latter's
    mean square. No gradient flows between layers, so all learn independently from one forward.
    """
    names = {module: name for name, module in converted(model).items()}
    losses: dict[str, Tensor] = {}

    def attend(module, query, key, value, attention_mask, **kwargs):
        with torch.no_grad():
            target = softmax_attention(module, native)(module, query, key, value, attention_mask, **kwargs)[0]
        with torch.enable_grad():
            inputs = (x.detach() for x in (query, key, value))
            output = module.linear_attention(*inputs, attention_mask, **kwargs)
            # A module that several layers share (ALBERT's) attends several times.
            losses[names[module]] = losses.get(names[module], 0) + relative_error(output, target)
        return target, None

    AttentionInterface.register(TRANSFER, attend)
    AttentionMaskInterface.register(TRANSFER, ALL_MASK_ATTENTION_FUNCTIONS[native])
    try:
        with attention_implementation(model, TRANSFER):
            yield losses
    finally:
        AttentionInterface._global_mapping.pop(TRANSFER, None)
        AttentionMaskInterface._global_mapping.pop(TRANSFER, None)


class Transfer(nn.Module):
    """The objective of transfer: a batch -> the sum of the layers' losses, and each layer's own as a record."""

    def __init__(self, model: PreTrainedModel, native: str):
        super().__init__()
        self.model, self.native = model, native

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        with transferring(self.model, self.native) as losses:
            self.model(**batch.inputs)
        return sum(losses.values()), {"layers": {name: loss.detach() for name, loss in losses.items()}}
