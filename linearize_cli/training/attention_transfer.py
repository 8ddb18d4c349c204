"""Attention transfer: every linear attention layer is trained to match the output of the softmax attention
that it replaces.

Both get the same inputs, which come from the teacher's own hidden states.
"""

import sys
from collections.abc import Callable, Iterator
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
    """Return the softmax attention function that transformers calls for an attention module of the base
    model.

    Args:
        native: the name of the base model's attention implementation (`sdpa`, `eager`).
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(native, eager)


@contextmanager
def transferring(model: PreTrainedModel, native: str) -> Iterator[dict[str, Tensor]]:
    """Run the model as its softmax teacher while the context is open. Collect the loss of each linear layer.

    The loss is the squared error of the linear output, relative to the mean square of the softmax output, row
    by row. No gradient flows between layers, so one forward trains all layers independently.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).

    Yields:
        a dict that each forward fills: the loss (a scalar) under the name of the attention module.
    """
    names = {module: name for name, module in converted(model).items()}
    losses: dict[str, Tensor] = {}

    def attend(module, query, key, value, attention_mask, **kwargs):
        with torch.no_grad():
            target = softmax_attention(module, native)(module, query, key, value, attention_mask, **kwargs)[0]
        with torch.enable_grad():
            inputs = (x.detach() for x in (query, key, value))
            output = module.linear_attention(*inputs, attention_mask, **kwargs)
            # A module shared by several layers (ALBERT) attends several times in one forward.
            losses[names[module]] = losses.get(names[module], 0) + relative_error(output, target)
        return target, None

    with attending(model, attend, native):
        yield losses


@contextmanager
def attending(model: PreTrainedModel, attend: Callable, masks: str) -> Iterator[None]:
    """Let the model attend by a function of our own while the context is open.

    Args:
        attend: an attention function of transformers' interface.
        masks: the attention implementation whose masks the function takes (`sdpa`, `eager`).
    """
    AttentionInterface.register(TRANSFER, attend)
    AttentionMaskInterface.register(TRANSFER, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    try:
        with attention_implementation(model, TRANSFER):
            yield
    finally:
        AttentionInterface._global_mapping.pop(TRANSFER, None)
        AttentionMaskInterface._global_mapping.pop(TRANSFER, None)


class Transfer(Objective):
    """The training objective of attention transfer: the sum of the linear layers' losses. Each loss is also
    recorded alone.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).
        windows: chooses the training steps with a shorter window. None: every step has the whole window.
    """

    def __init__(self, model: PreTrainedModel, native: str, windows: "WindowDropout | None" = None):
        super().__init__()
        self.model, self.native, self.windows = model, native, windows

    def independent(self) -> list[list[nn.Parameter]]:
        """Return the trained parameters of each layer, as one list per layer. The gradients of a list are
        clipped together.
        """
        return [list(module.linear_attention.parameters()) for module in converted(self.model).values()]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        share = None if self.step is None or self.windows is None else self.windows.at(self.step)
        with shorter_windows(self.model, share), transferring(self.model, self.native) as losses:
            self.model(**batch.inputs)
        return layer_losses(losses, batch)


def layer_losses(losses: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of a batch, the sum over its layers, and each layer's loss for the log.

    If the batch is a part of a training step, both are its share of the whole batch's.

    Args:
        losses: the mean loss of the batch's rows (a scalar), by the name of the attention module.
    """
    share = len(batch) / len(batch.whole)
    losses = {name: share * loss for name, loss in losses.items()}
    return sum(losses.values()), {"layers": {name: loss.detach() for name, loss in losses.items()}}


@dataclass(frozen=True)
class WindowDropout:
    """Random training steps in which the local part sees a shorter window.

    In these steps the linear part takes over the tokens that the window loses, so it learns them too. The
    idea is from arXiv 2510.05901, which drops the whole window.

    Attributes:
        probability: the probability of such a step at step 0. It falls linearly to 0 at the last step.
        steps: the number of steps of the stage.
        seed: determines the random draw together with the step number. A resumed run and all processes
            therefore draw the same.
    """

    probability: float
    steps: int
    seed: int

    def at(self, step: int) -> float | None:
        """Return the share of the window that is kept at a training step, in [0, 1), or None for the whole
        window.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chance, share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return share if chance < self.probability * (1 - step / self.steps) else None


@contextmanager
def shorter_windows(model: PreTrainedModel, share: float | None) -> Iterator[None]:
    """Shorten the window of every linear layer while the context is open.

    Args:
        share: the share of the window's tokens that is kept, rounded down to whole tokens. None: the windows
            stay as they are.
    """
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
