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
    """The result of a model's forward, from which logits can be computed for a few tokens at a time.

    Attributes:
        model, inputs: the model and its keyword inputs.
        output: the model's output, with the logits of the first token only. It has all logits if `parts` is
            empty.
        parts: the outputs of the submodels (such as encoder and decoder) by name, in order. The LM head reads
            the last hidden states of the last one. Empty if the model cannot be split before its head.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    output: ModelOutput
    parts: Mapping[str, ModelOutput]

    def rows(self, counted: Tensor | None = None) -> Tensor:
        """Return one vector per token, to be passed to `logits` a few at a time: the last hidden states.

        If the model cannot be split before its LM head, the vectors are the logits themselves.

        Args:
            counted: `[B, T]` bool, the tokens to return. None means all.

        Returns:
            `[N, X]` for N tokens. X is the width of the hidden states, or the vocabulary size if the vectors
            are logits.
        """
        *_, output = self.output, *self.parts.values()
        found = output[STATES if self.parts else "logits"]
        return found.flatten(0, -2) if counted is None else found[counted]

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits `[n, vocab]` of n of the vectors that `rows` returned, `[n, X]`.

        The model's own forward is used, because it may scale, cap or shift logits. Its submodels do not run
        again: their stored outputs are used. Vectors that are logits already are returned unchanged.
        """
        if not self.parts:
            return rows
        *_, (last, output) = self.parts.items()
        with returning(self.model, {**self.parts, last: cut(output, rows[None])}):
            return self.model(**self.inputs).logits[0]


def decode_all(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    """Run a model's forward with all its logits computed at once.

    The result has the same interface as that of `decode`: its `rows` are the logits, and its `logits` returns
    them unchanged.
    """
    return Decoded(model, inputs, model(**inputs), {})


def decode(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Decoded:
    """Run a model's forward, but apply the LM head to one token only. The result can compute other logits
    later.

    This works if the model consists of submodels (such as a decoder) and an LM head that reads the last
    submodel's output. If it is built differently (OPT's head reads a grandchild), all logits are computed, as
    by `decode_all`.
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
    """Return a copy of a model's output in which `states` replace the last hidden states."""
    return type(output)(**{**output, STATES: states})


@contextmanager
def returning(model: nn.Module, outputs: Mapping[str, ModelOutput]) -> Iterator[None]:
    """Make child modules return stored outputs, without running, while the context is open.

    Args:
        outputs: the output of each child, by the child's name.
    """
    for name, output in outputs.items():
        model.get_submodule(name).forward = partial(return_stored, output)
    try:
        yield
    finally:
        for name in outputs:
            del model.get_submodule(name).forward


def return_stored(output: ModelOutput, *args: Any, **kwargs: Any) -> ModelOutput:
    """Return the stored output, whatever the arguments of the forward that it replaces."""
    return output
