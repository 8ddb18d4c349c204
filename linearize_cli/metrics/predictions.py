"""The predictions of several models at each position of the same text, and how far they agree.

A causal language model reads a long text in chunks, so that the logits of the whole text are never in memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.models.batch import IGNORED, causal_batch
from linearize_cli.models.decoding import Decoder
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM

AT_ONCE = 8192  # the most tokens in one forward
LOGITS = 1 << 26  # the most logits in one forward


@dataclass
class Predictions:
    """The predictions of several models at each of T positions, summed over blocks of text.

    A causal language model predicts the next token at each position.

    Attributes:
        count: `[T]` fp64, the number of predictions with a right answer. A classifier's predictions all
            count.
        loss: `[models, T]`, the negative log-likelihood of the right answers, in nats.
        kl: `[models - 1, T]`, KL(first model ‖ this model) in nats, for each model after the first.
        same: `[models - 1, T]`, the number of predictions where this and the first model have the same most
            probable token.
    """

    count: Tensor
    loss: Tensor
    kl: Tensor
    same: Tensor

    def perplexity(self, model: int, start: int = 0, end: int | None = None) -> float | None:
        """Return the perplexity of one model at positions start, ..., end - 1, or None without predictions there.

        Args:
            model: the model's index.
        """
        count = self.count[start:end].sum().item()
        return math.exp(self.loss[model, start:end].sum().item() / count) if count else None

    def mean(self, sums: Tensor) -> float:
        """Return `kl` or `same` of the second model, per prediction. There must be two models.

        Args:
            sums: the attribute `kl` or `same`, `[1, T]`.
        """
        return (sums.sum() / self.count.sum()).item()


@torch.no_grad()
def predictions(
    models: Sequence[PreTrainedModel],
    blocks: Tensor,
    task: Task | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    batch_size: int = 8,
) -> Predictions:
    """Compute the logits of blocks with each model, and compare their predictions.

    Args:
        models: the first one is the reference of `kl` and `same`.
        blocks: token ids `[N, L]`.
        task: makes the inputs and answers of a block. None is the task of a causal language model.
        progress: called with the number of tokens just read.
        batch_size: the most blocks in one forward. Long blocks are read in smaller batches.

    Raises:
        UserError: a model's logits are not numbers.
    """
    causal = task is None or isinstance(task, CausalLM)
    batch_of = causal_batch if task is None else task.batch
    tokens, total = tokens_at_once(models[0]), 0
    with evaluating(*models):
        for ids in blocks.split(max(1, min(batch_size, tokens // blocks.shape[1]))):
            batch = batch_of(ids.to(models[0].device))
            answers = (
                ids.new_zeros(len(ids), 1).to(models[0].device) if batch.labels is None else batch.labels
            )
            if causal:
                streams = [read(model, batch.inputs["input_ids"], tokens) for model in models]
            else:
                streams = [iter([model(**batch.inputs).logits]) for model in models]
            parts = answers.split(tokens if causal else answers.shape[1], 1)
            total = total + torch.cat([score(*part) for part in zip(parts, *streams, strict=True)], 1)
            progress(ids.numel())
    if not total.isfinite().all():
        raise UserError("a model's logits are not numbers (NaN)", "Try another --dtype, such as float32.")
    count, loss, kl, same = total.split([1, len(models), len(models) - 1, len(models) - 1])
    return Predictions(count[0], loss, kl, same)


def tokens_at_once(model: PreTrainedModel) -> int:
    """Return the largest number of tokens for one forward of a model. A large vocabulary lowers it."""
    return max(1, min(AT_ONCE, LOGITS // model.config.get_text_config().vocab_size))


def read(model: PreTrainedModel, ids: Tensor, tokens: int) -> Iterator[Tensor]:
    """Yield the logits `[B, n, vocab]` of a causal language model on ids `[B, T]`, n tokens at a time.

    Args:
        tokens: n, the length of a chunk. Longer rows are read with a cache.
    """
    if ids.shape[1] <= tokens:
        yield model(input_ids=ids, use_cache=False).logits
        return
    decoder = Decoder(model)
    cache = decoder.new_cache()
    for part in ids.split(tokens, 1):
        yield decoder(part, cache)


def score(answers: Tensor, *logits: Tensor) -> Tensor:
    """Compare the predictions of one or more models with the right tokens and with those of the first model.

    Args:
        answers: `[B, T]`, the right tokens, or `IGNORED` where there is none. T is 1 for a classifier.
        logits: one tensor for each model, `[B, T, vocab]`, or `[B, vocab]` of a classifier.

    Returns:
        `[3 * models - 1, T]`, sums over the batch in fp64 on the CPU. The rows are: the number of answers,
        each model's loss, KL(first model ‖ model) of each further model, and how often each further model
        agrees with the first.
    """
    counted = answers != IGNORED
    first, *others = (x.float().log_softmax(-1).reshape(*answers.shape, -1) for x in logits)
    values = [counted.float()]
    for x in (first, *others):
        values.append(cross_entropy(x.transpose(1, 2), answers, ignore_index=IGNORED, reduction="none"))
    values += [kl_div(x, first, log_target=True, reduction="none").sum(-1) for x in others]
    values += [(x.argmax(-1) == first.argmax(-1)).float() for x in others]
    return torch.stack(values).masked_fill(~counted, 0.0).cpu().double().sum(1)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode while the context is open."""
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)
