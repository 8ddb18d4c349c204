"""A model's logits a few tokens at a time, so that a large vocabulary never needs all of them at once."""

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
    """What a model gave for its inputs.

    Attributes:
        output: what its forward returned; where there are `parts`, with the logits of the first token alone.
        parts: what the models inside it returned, by name, in the order of their modules. Its head reads the last
            one's last states. Empty: the logits are there as a whole.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    output: ModelOutput
    parts: Mapping[str, ModelOutput]

    def rows(self, counted: Tensor | None = None) -> Tensor:
        """What `logits` makes a token's logits of, a row a token `[N, X]`, of those counted `[B, T]` alone."""
        *_, output = self.output, *self.parts.values()
        found = output[STATES if self.parts else "logits"]
        return found.flatten(0, -2) if counted is None else found[counted]

    def logits(self, rows: Tensor) -> Tensor:
        """`[n, X] -> [n, vocab]` as the model makes them, with whatever scale, cap or bias it has: its forward runs
        again, around what its parts returned.
        """
        if not self.parts:
            return rows
        *_, (last, output) = self.parts.items()
        with returning(self.model, {**self.parts, last: cut(output, rows[None])}):
            return self.model(**self.inputs).logits[0]


def whole(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    return Decoded(model, inputs, model(**inputs), {})


def decode(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    """Run a model, but give its head a single token to read.

    By structure: the children that are models themselves hold all but the head, and the last of them returns what
    the head reads. Where that does not hold (OPT's head reads a grandchild), the logits are whole.
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
    """The same output with other last states."""
    return type(output)(**{**output, STATES: states})


@contextmanager
def returning(model: nn.Module, outputs: Mapping[str, ModelOutput]) -> Iterator[None]:
    """While open, these children return these outputs instead of running."""
    for name, output in outputs.items():
        model.get_submodule(name).forward = partial(given, output)
    try:
        yield
    finally:
        for name in outputs:
            del model.get_submodule(name).forward


def given(output: ModelOutput, *args: Any, **kwargs: Any) -> ModelOutput:
    return output
