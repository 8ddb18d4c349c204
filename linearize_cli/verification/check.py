"""The input of every check of `verify` (`Subject`) and its result (`Finding`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.metrics.equivalence import Comparison
from linearize_cli.metrics.selfcheck import TOLERANCE
from linearize_cli.models.decoding import forward
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM
from linearize_cli.speculative.decode import why_no_tree
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.verification.speculation import Speculation

OK, TIE, FAIL = "ok", "tie", "FAIL"
NOISES = 4  # in half precision, forms may differ by this many times the measured rounding noise


@dataclass(frozen=True)
class Subject:
    """The model under test, with its test inputs and the settings that all checks of `verify` share.

    Attributes:
        task, model: the model and its task.
        texts: the prompts as token ids.
        rows: test tokens `[2, L]`. They span more than three windows or groups if the context is long enough.
        size: the largest window or group of the model's layers, in tokens.
        context: the model's context length in tokens.
        max_new: tokens to generate for each prompt.
        seed: the seed of all random inputs.
        noise: the largest change of a logit through rounding alone (`rounding_noise`).
        largest: the largest absolute logit.
        parents: the parent of each node of the token tree under test, -1 for the root.
        drafter: drafts the token trees that the model verifies.
        speculation: the speculative decoding that is compared with plain decoding, or None.
        target_noise: the rounding noise of the model whose tokens the speculation must give.
        no_tree: the reason why the model cannot verify a token tree, or None if it can.
        quick: True to skip the slow checks.
        tokenizer: the model's tokenizer.
        artifact: the folder that the model was loaded from, or None.
    """

    task: Task
    model: PreTrainedModel
    texts: list[list[int]]
    rows: Tensor
    size: int
    context: int
    max_new: int
    seed: int
    noise: float
    largest: float
    parents: Sequence[int] = (-1,)
    drafter: Drafter = Lookup()
    speculation: Speculation | None = None
    target_noise: float = 0.0
    no_tree: str | None = None
    quick: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    artifact: Path | None = None

    @property
    def half(self) -> bool:
        """Return True if the model computes in half precision."""
        return TOLERANCE[self.model.dtype] > TOLERANCE[torch.float32]

    def comparison(self) -> Comparison:
        """Return an empty comparison of logits, with the tolerance of the model's dtype.

        In half precision the tolerance is at most `NOISES` times the measured rounding noise.
        """
        tolerance = TOLERANCE[self.model.dtype]
        if self.half:
            tolerance = min(tolerance, NOISES * self.noise / max(1.0, self.largest))
        return Comparison(tolerance, self.largest)

    def generator(self) -> torch.Generator:
        """Return a new generator seeded with `seed`."""
        return torch.Generator().manual_seed(self.seed)

    def random_tokens(self, *shape: int) -> Tensor:
        """Return random token ids of a shape, on the model's device. Each call with the same shape gives the
        same ids.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, shape, generator=self.generator()).to(self.model.device)


@dataclass(frozen=True)
class Line:
    """A line of the table that `verify` prints.

    Attributes:
        name: the check's name, the same as in `failed`.
        measured: what was measured, as text.
        limit: the largest value allowed, as text. Empty without a limit.
        verdict: OK, TIE or FAIL. Empty for a measurement without a limit.
    """

    name: str
    measured: str
    limit: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        data: the check's parts of `verify.json`.
        lines: its lines of the table.
        limits: its limits, by name.
    """

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)


def is_linear(layer: object) -> bool:
    """Return True for a cache layer that belongs to a converted layer, whether its class is this package's or
    the artifact's.
    """
    return hasattr(layer, "trail")


def is_plain(layer: object) -> bool:
    """Return True for a cache layer of a converted layer that holds only the linear attention's state.

    Return False if it also keeps the inputs of the base model's convolutions.
    """
    return is_linear(layer) and all(x is None for x in getattr(layer, "conv_states", {}).values())


def compared(name: str, diff: float, limit: float, data: dict[str, Any], more: str = "") -> Finding:
    """Return the finding of a check that measures one difference and has one limit. It fails above the limit.

    Args:
        name: the check's name.
        diff: the difference.
        limit: the largest difference allowed.
        data: the check's part of `verify.json`.
        more: text that follows the difference in the table.
    """
    line = Line(name, f"{diff:.1e}{more}", f"{limit:.1e}", OK if diff <= limit else FAIL)
    return Finding(data, [line], {name: limit})


def not_checked(name: str, why: str) -> Finding:
    """Return the finding of a check that was not run, with the reason `why`. It has no verdict."""
    return Finding(lines=[Line(name, f"not possible: {why}")])


def refused(subject: Subject, name: str, why: str) -> Finding:
    """Return the finding of a check that the model cannot run, for the reason `why`.

    It is a failure for a causal model whose cache holds linear states alone and whose forward takes
    positions, because such a model must support every check. For any other model the check counts as not run.
    """
    if not isinstance(subject.task, CausalLM):
        return not_checked(name, why)
    cache = subject.task.start(subject.model, list(subject.rows[:1]))[0].new_cache()
    forward(subject.model, subject.rows[:1, :2], cache)
    if all(map(is_plain, cache.layers)) and "position_ids" in signature(subject.model.forward).parameters:
        return Finding(lines=[Line(name, f"not possible: {why}", "", FAIL)])
    return not_checked(name, why)


def no_tree_of(task: Task, model: PreTrainedModel) -> str | None:
    """Return the reason why a model cannot verify a token tree, or None if it can."""
    if not isinstance(task, CausalLM):
        return f"{task.kind} is not a causal language model, so it has no next token to draft"
    return why_no_tree(model)
