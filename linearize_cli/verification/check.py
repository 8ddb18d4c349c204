"""What a check of `verify` is given and what it returns."""

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
from linearize_cli.models.tasks import CausalLM, Task
from linearize_cli.speculative.decode import why_no_tree
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.verification.speculation import Speculation

OK, TIE, FAIL = "ok", "tie", "FAIL"
NOISES = 4  # times the noise: how far forms may differ in half precision


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        texts: the prompts' tokens.
        rows: `[2, L]` tokens, more than three windows or groups where the context has room.
        size: tokens from one edge of a window or group to the next.
        context: positions that the model has.
        noise: the largest change of a logit through rounding.
        largest: the largest absolute logit.
        parents: the parent of each tree node, -1 for none.
        drafter: drafts the trees that the model itself reads.
        speculation: what is compared with plain decoding, or None.
        target_noise: the noise of the speculation's target.
        no_tree: why the model reads no token tree, or None if it does.
        quick: whether to leave out what takes long.
        tokenizer: of the model; artifact: the folder it was loaded from, where it was.
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
        """True if the model computes in half precision."""
        return TOLERANCE[self.model.dtype] > TOLERANCE[torch.float32]

    def comparison(self) -> Comparison:
        """Return an empty comparison of logits. Its tolerance is the dtype's, or in half precision that of the measured
        noise if that is less.
        """
        tolerance = TOLERANCE[self.model.dtype]
        if self.half:
            tolerance = min(tolerance, NOISES * self.noise / max(1.0, self.largest))
        return Comparison(tolerance, self.largest)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def random_tokens(self, *shape: int) -> Tensor:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, shape, generator=self.generator()).to(self.model.device)


@dataclass(frozen=True)
class Line:
    """A line of the table; `name` is the check's, as `failed` has it, `verdict` empty where nothing is judged."""

    name: str
    measured: str
    limit: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check found: the parts of `verify.json` that it fills, and its lines of the table."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)


def is_linear(layer: object) -> bool:
    """Return whether a cache layer is a converted one, of this package's code or of the artifact's own."""
    return hasattr(layer, "trail")


def is_plain(layer: object) -> bool:
    """Return whether a cache layer keeps a converted layer's state and no other, as of a conv beside it."""
    return is_linear(layer) and all(x is None for x in getattr(layer, "conv_states", {}).values())


def compared(name: str, diff: float, limit: float, data: dict[str, Any], more: str = "") -> Finding:
    """Build the finding of a check that has one number and one limit."""
    line = Line(name, f"{diff:.1e}{more}", f"{limit:.1e}", OK if diff <= limit else FAIL)
    return Finding(data, [line], {name: limit})


def not_checked(name: str, why: str) -> Finding:
    return Finding(lines=[Line(name, f"not possible: {why}")])


def refused(subject: Subject, name: str, why: str) -> Finding:
    """Return the finding of a check that a model does not allow. A causal model that keeps nothing but states and takes
    positions has no reason to refuse a check: it fails.
    """
    if not isinstance(subject.task, CausalLM):
        return not_checked(name, why)
    cache = subject.task.start(subject.model, list(subject.rows[:1]))[0].new_cache()
    forward(subject.model, subject.rows[:1, :2], cache)
    if all(map(is_plain, cache.layers)) and "position_ids" in signature(subject.model.forward).parameters:
        return Finding(lines=[Line(name, f"not possible: {why}", "", FAIL)])
    return not_checked(name, why)


def no_tree_of(task: Task, model: PreTrainedModel) -> str | None:
    """Return why a model reads no token tree, or None if it does."""
    if not isinstance(task, CausalLM):
        return f"{task.kind} has no text of its own that a tree could follow"
    return why_no_tree(model)
