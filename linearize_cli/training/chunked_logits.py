"""Logits that are computed for a few tokens at a time, to limit memory with a large vocabulary."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

STATES = "last_hidden_state"


@dataclass(frozen=True)
class Decoded:
    """The result of a model's forward, from which logits can be computed in chunks.

    Attributes:
        model, inputs: the model and its inputs.
        output: the model's output. With `parts`, it has the logits of the first token only.
        parts: the outputs of the models inside it, by name, in module order. The head reads the last hidden
            states of the last one. If empty, `output` has all logits.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    output: ModelOutput
    parts: Mapping[str, ModelOutput]

    def rows(self, counted: Tensor | None = None) -> Tensor:
        """Return the inputs of `logits`, one row per token: hidden states, or the logits themselves without
        `parts`.

        Args:
            counted: `[B, T]` bool, the tokens to return. None means all.

        Returns:
            `[N, X]`, X being the width or the vocabulary size.
        """
        *_, output = self.output, *self.parts.values()
        found = output[STATES if self.parts else "logits"]
        return found.flatten(0, -2) if counted is None else found[counted]

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits `[n, vocab]` of rows `[n, X]` with the model's own forward, which may scale, cap
        or shift them.

        The forward runs with the stored outputs in place of the models inside it.
        """
        if not self.parts:
            return rows
        *_, (last, output) = self.parts.items()
        with returning(self.model, {**self.parts, last: cut(output, rows[None])}):
            return self.model(**self.inputs).logits[0]


def decode_all(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    """Run a model and keep all its logits."""
    return Decoded(model, inputs, model(**inputs), {})


def decode(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    """Run a model, but compute the logits of one token only.

    The children that are models themselves contain everything but the head, and the head reads the output of
    the last one. If a model is built differently (OPT's head reads a grandchild), all logits are computed.
    """
    children = {name: child for name, child in model.named_children() if isinstance(child, PreTrainedModel)}
    last, parts = next(reversed(children), None), {}

    def keep(name: str, module: nn.Module, args: tuple, output: object) -> object:
        if not (isinstance(output, ModelOutput) and STATES in output):
            return None
        parts[name] = output
        return cut(output, output[STATES][:, :1]) if name == last else None

    hooks = [child.register_forward_hook(partial(keep, name)) for name, child in children.items()]
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    ordered = {name: parts[name] for name in children if name in parts}
    return Decoded(model, inputs, output, ordered if last in parts else {})


def cut(output: ModelOutput, states: Tensor) -> ModelOutput:
    """Return an output with other last hidden states."""
    return type(output)(**{**output, STATES: states})


@contextmanager
def returning(model: nn.Module, outputs: Mapping[str, ModelOutput]) -> Iterator[None]:
    """Make child modules return stored outputs, without running, while the context is open."""
    for name, output in outputs.items():
        model.get_submodule(name).forward = partial(return_stored, output)
    try:
        yield
    finally:
        for name in outputs:
            del model.get_submodule(name).forward


def return_stored(output: ModelOutput, *args: Any, **kwargs: Any) -> ModelOutput:
    """Return the stored output."""
    return output
