"""The kinds of speculative decoding that `verify` checks, and the models and drafters that they need."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import load
from linearize_cli.errors import UserError
from linearize_cli.speculative.assisted import assisted
from linearize_cli.speculative.decode import Step, speculate
from linearize_cli.speculative.drafts import CHAIN as LENGTH
from linearize_cli.speculative.drafts import Draft, Drafter
from linearize_cli.speculative.medusa import FILE, load_heads
from linearize_cli.speculative.pairs import Pair, drafted_by, drafting_for_teacher
from linearize_cli.speculative.trees import AUTO, CHAIN, NAMED, chain, named_tree, read_choices

MEDUSA, LOOKUP = "medusa", "lookup"
DEFAULT_TREE = NAMED["mc_sim_7b_63"].parents


class Clock:
    """A stopwatch that sums the seconds between each `start` and `stop`. Both accept a hook's arguments."""

    def __init__(self):
        self.seconds = 0.0

    def start(self, *unused: object) -> None:
        """Start the clock."""
        self.seconds -= time.perf_counter()

    def stop(self, *unused: object) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter()


@dataclass(frozen=True)
class Speculation:
    """One kind of speculative decoding.

    Attributes:
        name: the drafter's name in reports.
        target: the model whose own tokens the decoding must give.
        run: decodes greedily, without a stop token. It takes prompts and the number of new tokens, and
            returns the steps.
        clock: measures the time spent on drafting.
        batched: True if `run` accepts several prompts at once.
    """

    name: str
    target: PreTrainedModel
    run: Callable[[Sequence[Sequence[int]], int], Iterable[Step]]
    clock: Clock
    batched: bool = True


@dataclass(frozen=True)
class Clocked:
    """A drafter whose time is measured by a clock."""

    drafter: Drafter
    clock: Clock = field(default_factory=Clock)

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Return the drafter's token trees.

        Args:
            rows: the token ids of each row so far.
            hidden: the last hidden states, from which the drafter may predict.
        """
        self.clock.start()
        try:
            return self.drafter.draft(rows, hidden)
        finally:
            self.clock.stop()


def by_trees(model: PreTrainedModel, drafter: Drafter) -> Speculation:
    """Return the speculative decoding in which a drafter proposes token trees and a linearized model verifies
    them.
    """
    clocked = Clocked(drafter)
    name = type(drafter).__name__.lower()
    return Speculation(name, model, lambda texts, new: speculate(model, texts, clocked, new), clocked.clock)


def by_pair(pair: Pair, name: str) -> Speculation:
    """Return the speculative decoding of a pair by transformers' assisted generation: one model drafts for
    the other.
    """
    clock = Clock()
    pair.drafter.register_forward_pre_hook(clock.start)
    pair.drafter.register_forward_hook(clock.stop)
    return Speculation(
        name, pair.target, lambda texts, new: assisted(pair, texts[0], new), clock, batched=False
    )


def load_drafted(
    folder: Path, draft: str | None, target: str, tree: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Load an artifact and its drafter.

    Args:
        folder: the artifact.
        draft: "medusa", "lookup" or a model. None chooses medusa if the artifact has heads, else lookup.
        target: "self" if the artifact's own tokens are drafted. "teacher" if the artifact drafts for its
            softmax teacher.
        tree: the name of a tree, or a JSON file of choices. None chooses the heads' own tree for drafts, and
            a tree of 64 nodes for the check `tree`.
        options: the arguments `device`, `dtype`, `trust_remote_code` and `checksums` of `load`. With
            `trust_remote_code` the artifact runs its own code.

    Returns:
        The model, its tokenizer, and the arguments of `verify_model` that determine the speculation.

    Raises:
        UserError: the artifact, the drafter or the teacher cannot be loaded, or the tree does not exist.
    """
    heads, ways = (folder / FILE).is_file(), {}
    if target == "teacher":
        if draft is not None:
            what = "--draft cannot be used with --target teacher, where the artifact itself drafts"
            raise UserError(what, "Leave out --draft.")
        pair = drafting_for_teacher(folder, **options)
        model, ways["speculation"] = pair.drafter, by_pair(pair, "the artifact, for its teacher")
    elif draft not in (None, MEDUSA, LOOKUP):
        pair = drafted_by(folder, draft, **options)
        model, ways["speculation"] = pair.target, by_pair(pair, draft)
    else:
        pair = None
        model, tokenizer = load(folder, **options, own_code=options["trust_remote_code"])
    if draft == MEDUSA or (heads and draft != LOOKUP):
        own = load_heads(folder, model)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        choices = named_tree(tree or AUTO, len(own), vocabulary, own.tree)
        ways["drafter"] = own.drafter(choices)
    elif tree is not None:
        known = {CHAIN: chain(LENGTH), **NAMED}
        choices = known[tree] if tree in known else read_choices(tree, known)
    if tree is not None:
        ways["parents"] = choices.parents
    return model, (pair.tokenizer if pair else tokenizer), ways
