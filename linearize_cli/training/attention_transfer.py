"""Attention transfer: every linear layer learns its softmax layer's output on the teacher's own hidden states."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from linearize_cli.models.batch import Batch
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.training.distillation import relative_error
from linearize_cli.training.objective import Objective

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


class Transfer(Objective):
    """The objective of transfer: a batch -> the sum of the layers' losses, and each layer's own as a record.

    `windows` says which steps have shorter windows; None: none.
    """

    def __init__(self, model: PreTrainedModel, native: str, windows: "WindowDropout | None" = None):
        super().__init__()
        self.model, self.native, self.windows = model, native, windows

    def independent(self) -> list[list[nn.Parameter]]:
        """What each layer learns, apart from the others: gradients are clipped layer by layer."""
        return [list(module.linear_attention.parameters()) for module in converted(self.model).values()]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        share = None if self.step is None or self.windows is None else self.windows.at(self.step)
        with shorter_windows(self.model, share), transferring(self.model, self.native) as losses:
            self.model(**batch.inputs)
        return sum(losses.values()), {"layers": {name: loss.detach() for name, loss in losses.items()}}


@dataclass(frozen=True)
class WindowDropout:
    """Steps with a random shorter window: what it hides is far then, so the far part learns it too (the idea of
    arXiv 2510.05901, which leaves the window out).

    Attributes:
        probability: that a step has one, at step 0; it falls linearly to 0 at the last.
        steps: of the stage.
        seed: decides with the step alone, so that a resumed run and every process see the same.
    """

    probability: float
    steps: int
    seed: int

    def at(self, step: int) -> float | None:
        """The share of the window that is left, in [0, 1); None: all of it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chance, share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return share if chance < self.probability * (1 - step / self.steps) else None


@contextmanager
def shorter_windows(model: PreTrainedModel, share: float | None) -> Iterator[None]:
    """While open, every layer's window has this share of its tokens, rounded down; None: all."""
    attentions = [module.linear_attention for module in converted(model).values()]
    before = [attention.equation for attention in attentions]
    if share is not None:
        for attention, equation in zip(attentions, before, strict=True):
            attention.equation = replace(equation, size=int(share * equation.size))
    try:
        yield
    finally:
        for attention, equation in zip(attentions, before, strict=True):
            attention.equation = equation
