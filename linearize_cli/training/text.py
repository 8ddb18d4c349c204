"""The training text and the evaluation text of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.data import sources as text
from linearize_cli.data.names import DEMO, SELF
from linearize_cli.data.self_generated import write_corpus
from linearize_cli.models.batch import Batch, Blocks
from linearize_cli.models.task import Task
from linearize_cli.terminal import Terminal
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job


def open_sources(job: Job, bad: text.BadRows) -> list[text.Source | None]:
    """Open the training texts of a job. The list is empty if the job needs none.

    Args:
        bad: counts the skipped rows, which cannot be used.

    Returns:
        one source per text. None stands for `self`, the text that is sampled from the model later.
    """
    names = job.data or ((DEMO,) if job.model == DEMO else (job.recipe.recover.data,))
    needed = job.train or job.data
    return [None if name == SELF else text.open_source(name, bad) for name in names] if needed else []


class NamedText:
    """The texts that a job names. They are opened before the model is loaded, so that a wrong name fails at
    once.

    Attributes:
        bad: the rows that were skipped because they cannot be used.
        sources: the training texts. None stands for `self`, which is not sampled yet.
        train: the joined training text. None without training, or before `self` is sampled.
        evaluation: the evaluation text: the named one, or a part that is held out of the training text. None
            if there is no text, before `self` is sampled, or if the training text is a single document, which
            `blocks` divides.
    """

    def __init__(self, job: Job):
        self.job, self.bad = job, text.BadRows(job.skip_bad_rows)
        self.sources = open_sources(job, self.bad)
        self.named_evaluation = text.open_source(job.eval_data, self.bad) if job.eval_data else None
        self.train = self.evaluation = None
        if None not in self.sources:
            self.split()

    def split(self) -> None:
        """Join the training sources into one, and hold out a part of it if no evaluation text is named."""
        self.train = text.joined(self.sources) if self.sources else None
        self.evaluation = self.named_evaluation
        if self.train is not None and self.evaluation is None:
            self.train, self.evaluation = text.hold_out(self.train)

    def read_through(self, tokenizer: PreTrainedTokenizerBase, task: Task, terminal: Terminal) -> None:
        """Read every local text once, so that an unusable row stops the run before training starts.

        A row is unusable if the chat template refuses it, or if a token has no embedding in the model. Rows
        that the job allows to be skipped are reported. Remote texts are not read.

        Raises:
            BadRow: more rows are unusable than the job allows.
        """
        for source in filter(None, [*self.sources, self.named_evaluation]):
            text.read_through(source, tokenizer, task)
        self.bad.report(terminal)

    def write_own(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Path,
        length: int,
        terminal: Terminal,
        engine: Engine,
    ) -> None:
        """Replace a `self` source by text sampled from the model, up to its share of the token budget. Do
        nothing if no source is `self`.

        Args:
            corpus: the JSONL file that the main process writes the text to.
            length: the largest length of a sampled document, in tokens.
        """
        if None not in self.sources:
            return
        share = -(-self.job.recipe.recover.tokens // len(self.sources))
        engine.on_main(write_corpus, model, tokenizer, corpus, share, length, self.job.seed, terminal)
        self.sources = [source or text.open_source(str(corpus), self.bad) for source in self.sources]
        self.split()

    def blocks(
        self, job: Job, tokenizer: PreTrainedTokenizerBase, task: Task, length: int, terminal: Terminal
    ) -> "TextBlocks":
        """Return the text cut into blocks of `length` tokens.

        Args:
            job: the run configuration, with its batch size resolved.

        Raises:
            UserError: the training text or the evaluation text does not fill one block.
        """
        train, evaluation, held_out = self.train, self.evaluation, None
        if train is not None and evaluation is None:
            train, evaluation = text.hold_out_blocks(train, tokenizer, length)
            terminal.note(f"held out for evaluation: {evaluation.name}")
        if evaluation is not None:
            held_out = text.evaluation_blocks(evaluation, tokenizer, length, job.eval_tokens)
        found = TextBlocks(job, tokenizer, task, length, train if job.train else None, held_out)
        if found.train is not None:
            next(found.stream())  # text that fills no block is found now, not after the first measurements
        return found


@dataclass(frozen=True)
class TextBlocks:
    """The text of a run in blocks of tokens.

    Attributes:
        job: the run configuration, with its batch size resolved.
        tokenizer, task: the model's tokenizer, and its task, which makes batches from blocks.
        length: the number of tokens in a block.
        train: the training source. None without training.
        held_out: the evaluation blocks `[N, length]`. None without evaluation text.
    """

    job: Job
    tokenizer: PreTrainedTokenizerBase
    task: Task
    length: int
    train: text.Source | None
    held_out: Tensor | None

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens in a batch, over all processes."""
        return self.length * self.job.batch_size

    def stream(self, skip: int = 0) -> Iterator[Blocks]:
        """Yield batches of training text without end, after the first `skip` batches."""
        size, recover = self.job.batch_size, self.job.recipe.recover
        return text.stream(self.train, self.tokenizer, self.length, size, recover, skip)

    def batches(self, engine: Engine, start: int = 0) -> Callable[[int], Iterator[Batch]]:
        """Return a function that takes a number of finished steps `done`, and yields this process's training
        batches after the first `start + done`.
        """

        def after(done: int) -> Iterator[Batch]:
            return (self.task.batch(engine.share(blocks)) for blocks in self.stream(start + done))

        return after

    def held_out_batches(self, engine: Engine, most: int) -> Iterator[Batch]:
        """Yield the first `most` held-out blocks in batches. All processes get the same ones."""
        for ids in self.held_out[:most].split(self.job.batch_size):
            yield self.task.batch(ids.to(engine.device))
