"""How fast a student is beside its teacher, and what memory both take, phase by phase.

- **prefill**: one forward over the context, with a cache and the logits of the last token alone. An encoder, which
  keeps no cache, reads the context; of an encoder-decoder, the encoder does, and the decoder begins.
- **decode**: one token of every row, with a cache that holds all but the last tokens of the context, up to the whole.
- **train**: forward and backward over the context, all weights learning, without an optimizer or dropout.
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
from linearize_cli.models.tasks import Task

REPEATS = 9  # at most
STEPS = 32  # of decoding, at most
UNTIMED = 2  # runs before the timed ones: one that warms up, one whose memory is watched


class Phase:
    """What a model does with ids `[B, context]` in one phase; `once` does it once.

    Attributes:
        tokens: that it reads each time.
        repeats: at most, the untimed ones not counted.
        cache: what it left behind last, or goes on with; None: it keeps none.
        goes_on: whether it begins with its cache.
        held: bytes of the cache that it began with when its memory was watched.
    """

    repeats = REPEATS
    cache: Cache | None = None
    goes_on = False
    held = 0

    def __init__(self, task: Task, model: PreTrainedModel, ids: Tensor):
        self.task, self.model, self.ids = task, model, ids
        self.tokens = ids.numel()

    def once(self) -> None:
        raise NotImplementedError

    def begun(self, ids: Tensor) -> tuple[Decoder, Cache]:
        """A decoder that has read ids, and its cache."""
        decoder, first, _ = self.task.start(self.model, list(ids))
        cache = decoder.new_cache()
        decoder.begin(first, cache)
        return decoder, cache


class Prefill(Phase):
    @torch.no_grad()
    def once(self) -> None:
        if self.task.decodes:
            self.cache = self.begun(self.ids)[1]
        else:
            self.model(**self.task.batch(self.ids).inputs)


class Decode(Phase):
    goes_on = True

    @torch.no_grad()
    def __init__(self, task: Task, model: PreTrainedModel, ids: Tensor):
        super().__init__(task, model, ids)
        steps = min(UNTIMED + STEPS, ids.shape[1] // 2)
        self.tokens, self.repeats = len(ids), steps - UNTIMED
        self.decoder, self.cache = self.begun(ids[:, :-steps])
        self.following = iter(ids[:, -steps:].split(1, 1))

    @torch.no_grad()
    def once(self) -> None:
        self.decoder(next(self.following), self.cache)


class Train(Phase):
    """A classifier, which text has no answers for, learns to say its first class."""

    def once(self) -> None:
        batch = self.task.batch(self.ids)
        logits = self.model(**batch.inputs).logits
        labels = logits.new_zeros(len(self.ids), dtype=torch.long) if batch.labels is None else batch.labels
        loss = cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        self.model.zero_grad()


PHASES: dict[str, type[Phase]] = {"prefill": Prefill, "decode": Decode, "train": Train}


def measure(
    phase: str, task: Task, models: Mapping[str, PreTrainedModel], ids: Tensor, budget: float
) -> list[dict[str, Any]]:
    """A row of `bench.json` for each model, measured in turn with the others: the repeats take `budget` seconds at
    most, or as long as one.
    """
    about = (phase, ids.shape[1], len(ids))
    ready: dict[str, Phase] = {}
    peaks: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {}
    for name, model in models.items():
        with memory_permitting(model):
            found, more = peak_bytes(
                partial(warm, phase, task, model, ids), methodcaller("once"), model.device
            )
            peaks[name] = None if more is None else model.get_memory_footprint() + found.held + more
            ready[name] = found
    with memory_permitting(*models.values()):
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
    found = PHASES[phase](task, model, ids)
    found.once()
    found.held = cache_bytes(found.cache) if found.goes_on else 0
    return found


@contextmanager
def memory_permitting(*models: PreTrainedModel) -> Iterator[None]:
    """Ends early where there is no memory left, and then makes room."""
    failed = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = True
    if failed:  # the error, and so its frames, are gone
        for model in models:
            model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def row(model: str, phase: str, context: int, batch: int) -> dict[str, Any]:
    return {"model": model, "phase": phase, "context": context, "batch": batch}


def measured(row: dict[str, Any], phase: Phase, seconds: list[float], peak: int | None) -> dict[str, Any]:
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
    numbers = dict.fromkeys(("seconds", "tokens_per_s", "peak_bytes", "state_bytes"))
    return {**row(model, phase, context, batch), **numbers, "repeats": 0, "reason": reason}
