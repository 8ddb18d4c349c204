"""Ways of speculative decoding, as the checks of `verify` run them."""

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
    """Adds up the seconds between its starts and stops."""

    def __init__(self):
        self.seconds = 0.0

    def start(self, *unused: object) -> None:
        self.seconds -= time.perf_counter()

    def stop(self, *unused: object) -> None:
        self.seconds += time.perf_counter()


@dataclass(frozen=True)
class Speculation:
    """One way of speculative decoding.

    Attributes:
        name: of what drafts.
        target: the model whose tokens it must write.
        run: `(prompts, max_new) -> steps`, greedily and without a stop.
        clock: of drafting.
        batched: whether `run` takes several prompts.
    """

    name: str
    target: PreTrainedModel
    run: Callable[[Sequence[Sequence[int]], int], Iterable[Step]]
    clock: Clock
    batched: bool = True


@dataclass(frozen=True)
class Clocked:
    """A drafter on a clock."""

    drafter: Drafter
    clock: Clock = field(default_factory=Clock)

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        self.clock.start()
        try:
            return self.drafter.draft(rows, hidden)
        finally:
            self.clock.stop()


def by_trees(model: PreTrainedModel, drafter: Drafter) -> Speculation:
    """A linearized model that reads the token trees of a drafter."""
    clocked = Clocked(drafter)
    name = type(drafter).__name__.lower()
    return Speculation(name, model, lambda texts, new: speculate(model, texts, clocked, new), clocked.clock)


def by_pair(pair: Pair, name: str) -> Speculation:
    """A target, and a model that drafts chains for it, through transformers' assisted generation."""
    clock = Clock()
    pair.drafter.register_forward_pre_hook(clock.start)
    pair.drafter.register_forward_hook(clock.stop)
    return Speculation(
        name, pair.target, lambda texts, new: assisted(pair, texts[0], new), clock, batched=False
    )


def load_drafted(
    folder: Path, draft: str | None, target: str, tree: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """An artifact's model and tokenizer, and how it is to be speculated with: arguments of `verify_model`.

    Args:
        draft: "medusa", "lookup" or a model; None: medusa where the artifact has heads, else lookup.
        target: "self", or "teacher": the artifact drafts for its softmax model.
        tree: the name of a tree or a file of choices; None: the heads' own, and one of 64 nodes.
        options: of `load`: `device`, `dtype` and `trust_remote_code`, with which the artifact runs its own code.

    Raises:
        UserError: the artifact, the drafter or the teacher cannot be had, or there is no such tree.
    """
    heads, ways = (folder / FILE).is_file(), {}
    if target == "teacher":
        if draft is not None:
            raise UserError("--target teacher: the artifact itself drafts", "Leave out --draft.")
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
