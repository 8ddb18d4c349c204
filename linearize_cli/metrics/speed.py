"""The speed and memory of a student and its teacher in each phase.

- **prefill**: one forward over the context, with a cache and the logits of the last token only. An encoder has no
  cache. In an encoder-decoder, the encoder reads the context and the decoder its first token.
- **decode**: one token for every row, with a cache that holds the context except its last tokens, which are decoded.
- **train**: one forward and backward over the context, with gradients for all weights, without an optimizer or
  dropout.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel

from linearize_cli.metrics.memory import cache_bytes
from linearize_cli.metrics.timing import interleaved, out_of_memory, peak_bytes
from linearize_cli.models.batch import IGNORED
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.task import Task

REPEATS = 9  # the most timed repeats
STEPS = 32  # the most timed decoding steps
UNTIMED = 2  # runs before the timed ones: a warm-up, and one whose peak memory is measured


class Phase:
    """One phase (prefill, decode or train) of a model on ids `[B, context]`.

    Attributes:
        tokens: the number of tokens that each run reads.
        repeats: the largest number of timed runs.
        cache: the cache of the last run, or None if the phase has none.
        keeps_cache: True if each run continues with the cache of the run before.
        initial_bytes: the size of that cache before the run whose peak memory is measured. 0 if no cache is
            kept.
    """

    repeats = REPEATS
    cache: Cache | None = None
    keeps_cache = False
    initial_bytes = 0

    def __init__(self, task: Task, model: PreTrainedModel, ids: Tensor):
        self.task, self.model, self.ids = task, model, ids
        self.tokens = ids.numel()

    def once(self) -> None:
        """Run the phase once."""
        raise NotImplementedError

    def prefilled(self, ids: Tensor) -> tuple[Decoder, Cache]:
        """Read ids `[B, T]` into a new cache, and return the model's decoder and the cache."""
        decoder, first, _ = self.task.start(self.model, list(ids))
        cache = decoder.new_cache()
        decoder.begin(first, cache)
        return decoder, cache


class Prefill(Phase):
    """One forward over the context."""

    @torch.no_grad()
    def once(self) -> None:
        """Read the context, with a new cache if the model decodes."""
        if self.task.decodes:
            self.cache = self.prefilled(self.ids)[1]
        else:
            self.model(**self.task.batch(self.ids).inputs)


class Decode(Phase):
    """One decoding step for every row, after the context."""

    keeps_cache = True

    @torch.no_grad()
    def __init__(self, task: Task, model: PreTrainedModel, ids: Tensor):
        super().__init__(task, model, ids)
        steps = min(UNTIMED + STEPS, ids.shape[1] // 2)
        self.tokens, self.repeats = len(ids), steps - UNTIMED
        self.decoder, self.cache = self.prefilled(ids[:, :-steps])
        self.following = iter(ids[:, -steps:].split(1, 1))

    @torch.no_grad()
    def once(self) -> None:
        """Decode the next token of every row."""
        self.decoder(next(self.following), self.cache)


class Train(Phase):
    """One forward and backward. Without labels in plain text, every label is 0."""

    def once(self) -> None:
        """Compute the gradients of all weights and drop them."""
        batch = self.task.batch(self.ids)
        logits = self.task.result(self.model(**batch.inputs))
        labels = batch.labels
        if labels is None:
            labels = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
        loss = cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        self.model.zero_grad()


PHASES: dict[str, type[Phase]] = {"prefill": Prefill, "decode": Decode, "train": Train}


def measure(
    phase: str, task: Task, models: Mapping[str, PreTrainedModel], ids: Tensor, budget: float
) -> list[dict[str, Any]]:
    """Measure one phase of all models, which take turns in every repeat.

    Args:
        models: by name, `teacher` and `student`.
        ids: `[B, context]`.
        budget: seconds for all repeats. At least one repeat runs.

    Returns:
        A row of `bench.json` for each model. Its numbers are None if memory ran out.
    """
    about = (phase, ids.shape[1], len(ids))
    ready: dict[str, Phase] = {}
    peaks: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {}
    for name, model in models.items():
        with skip_if_out_of_memory(model):
            found, more = peak_bytes(
                partial(warm, phase, task, model, ids), methodcaller("once"), model.device
            )
            peaks[name] = None if more is None else model.get_memory_footprint() + found.initial_bytes + more
            ready[name] = found
    with skip_if_out_of_memory(*models.values()):
        repeats = min((found.repeats for found in ready.values()), default=0)
        ways = {name: found.once for name, found in ready.items()}
        seconds = interleaved(ways, ids.device, repeats, budget)
    return [
        measured(row(name, *about), ready[name], seconds[name], peaks[name])
        if name in seconds
        else unmeasured(name, *about, "out of memory")
        for name in models
    ]


def warm(phase: str, task: Task, model: PreTrainedModel, ids: Tensor) -> Phase:
    """Prepare a phase of a model, run it once as a warm-up, and return it.

    Args:
        phase: `prefill`, `decode` or `train`.
    """
    found = PHASES[phase](task, model, ids)
    found.once()
    found.initial_bytes = cache_bytes(found.cache) if found.keeps_cache else 0
    return found


@contextmanager
def skip_if_out_of_memory(*models: PreTrainedModel) -> Iterator[None]:
    """Run the code inside the context. If memory runs out, end the context without an error and free memory.

    The gradients and the GPU's cached memory are freed.
    """
    failed = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = True
    if failed:  # after the except block, so that the error's frames no longer hold tensors
        for model in models:
            model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def row(model: str, phase: str, context: int, batch: int) -> dict[str, Any]:
    """Return the fields that identify a row of `bench.json`: model, phase, context length and batch size."""
    return {"model": model, "phase": phase, "context": context, "batch": batch}


def measured(row: dict[str, Any], phase: Phase, seconds: list[float], peak: int | None) -> dict[str, Any]:
    """Return a row of `bench.json` with its measurements.

    Args:
        row: the keys that identify the row.
        phase: the phase that ran.
        seconds: the seconds of each repeat.
        peak: the peak bytes, or None if they cannot be measured.
    """
    return {
        **row,
        "seconds": median(seconds),
        "tokens_per_s": phase.tokens / median(seconds),
        "peak_bytes": peak,
        "state_bytes": None if phase.cache is None else cache_bytes(phase.cache),
        "repeats": len(seconds),
        "reason": None,
    }


def unmeasured(model: str, phase: str, context: int, batch: int, reason: str) -> dict[str, Any]:
    """Return a row of `bench.json` whose measurements are None, with the reason."""
    numbers = dict.fromkeys(("seconds", "tokens_per_s", "peak_bytes", "state_bytes"))
    return {**row(model, phase, context, batch), **numbers, "repeats": 0, "reason": reason}
