"""Distillation: the linearized model is trained on the logits of its softmax teacher."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from linearize_kernels.equation import accumulator
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from linearize_cli.methods.recipe import Distill
from linearize_cli.models.batch import IGNORED, Batch
from linearize_cli.models.distances import cosine_distance, pool, total_divergence
from linearize_cli.runtime.dispatch import attention_implementation
from linearize_cli.training.chunked_logits import STATES, Decoded, decode, decode_all
from linearize_cli.training.objective import Objective
from linearize_cli.training.parallel import process_mean

TINY = 1e-12  # lower bound of divisors
LOGITS = 1 << 26  # largest number of logits in memory, for teacher and student each: 256 MB in fp32


class Distillation(Objective):
    """The objective of distillation.

    The loss is `kl · KL(teacher ‖ student) + ce · cross entropy + hidden · error of the last hidden states +
    embedding · (1 - cosine of the embeddings)`. The KL is the mean over the batch's counted tokens
    (`Batch.counted`), and the cross entropy the mean over the tokens with a label. The error is the squared
    error relative to the teacher's mean square, row by row. An embedding is pooled from the last hidden states.

    A batch with more than `limit` logits is processed a few tokens at a time, and the backward computes their
    logits again. Memory for logits then does not grow with the batch.

    Args:
        student: the linearized model, with or without LoRA.
        native: the attention implementation of the base model (`sdpa`, `eager`).
        weights: the weights `kl`, `ce`, `hidden` and `embedding` of the four terms, from the recipe.
        teacher: the frozen softmax model. None: the student's own model is the teacher too, with its softmax
            attention and without LoRA, so its weights are in memory once.
        limit: the largest number of logits in memory.
        pooling: how the hidden states become embeddings (see `pool`).
    """

    def __init__(
        self,
        student: PeftModel | PreTrainedModel,
        native: str,
        weights: Distill,
        teacher: PreTrainedModel | None = None,
        limit: int = LOGITS,
        pooling: str = "mean",
    ):
        super().__init__()
        self.student, self.native, self.weights, self.teacher = student, native, weights, teacher
        self.limit, self.pooling = limit, pooling

    @property
    def model(self) -> PreTrainedModel:
        """Return the student's model, without the LoRA wrapper."""
        return self.student.get_base_model() if isinstance(self.student, PeftModel) else self.student

    @contextmanager
    def as_teacher(self) -> Iterator[PreTrainedModel]:
        """Yield the teacher. If student and teacher share one model, it computes as the teacher while the
        context is open.
        """
        model = self.teacher or self.model
        off = nullcontext() if self.teacher else self.student.disable_adapter()
        with torch.no_grad(), attention_implementation(model, self.native), off:
            yield model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        weights, vocabulary = self.weights, self.model.config.get_text_config().vocab_size
        compares_states = bool(weights.hidden or weights.embedding)
        inputs = batch.inputs | ({"output_hidden_states": True} if compares_states else {})
        large = batch.labels is not None and batch.labels.numel() * vocabulary > self.limit
        run = decode if large else decode_all
        student, teacher = run(self.model, inputs), None
        if weights.kl or compares_states:
            with self.as_teacher() as model:
                teacher = run(model, inputs)
        loss = torch.zeros((), device=self.model.device)
        if weights.kl or weights.ce:
            loss = loss + self.token_loss(student, teacher, batch, max(1, self.limit // vocabulary))
        if compares_states:
            states = last_hidden(student.output), last_hidden(teacher.output)
            loss = loss + len(batch) / len(batch.whole) * self.state_loss(*states, batch)
        return loss, {}

    def state_loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return the terms of the last hidden states and of the embeddings, weighted (a scalar).

        Args:
            student, teacher: last hidden states `[B, T, width]`.
        """
        loss, weights = student.new_zeros((), dtype=accumulator(student.dtype)), self.weights
        if weights.hidden:
            loss = loss + weights.hidden * relative_error(student, teacher, batch.counted)
        if weights.embedding:
            mask = batch.inputs.get("attention_mask")
            texts = (pool(x.to(loss.dtype), mask, self.pooling) for x in (teacher, student))
            loss = loss + weights.embedding * cosine_distance(*texts)
        return loss

    def token_loss(self, student: Decoded, teacher: Decoded | None, batch: Batch, size: int) -> Tensor:
        """Return the terms that are means over tokens: the KL and the cross entropy, weighted (a scalar).

        Args:
            student, teacher: the results of both forwards. The teacher is not used, and may be None, without
                KL.
            size: the number of tokens per chunk, if the logits are not stored but computed chunk by chunk.
        """
        rows, targets, answers = student.rows(batch.counted), None, None
        if self.weights.kl:
            targets = teacher.rows(batch.counted)
        if self.weights.ce:
            answers = batch.labels.flatten() if batch.counted is None else batch.labels[batch.counted]
        # Counts differ between processes and between the parts of a batch. With the whole batch's counts, averaged
        # over the processes, the parts' losses add up to the loss of all rows.
        whole = batch.whole
        parts = len(whole) / len(batch)
        tokens = len(rows) * parts if batch.counted is None else mean_count(whole.counted)
        right = None if answers is None else mean_count(whole.labels != IGNORED)
        part = partial(self.part, student, teacher, tokens, right)
        if not student.parts:
            return part(rows, targets, answers)
        chunks = rows.split(size)
        others = ([None] * len(chunks) if x is None else x.split(size) for x in (targets, answers))
        again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        return sum(again(*chunk) for chunk in zip(chunks, *others, strict=True))

    def part(
        self,
        student: Decoded,
        teacher: Decoded | None,
        tokens: int | Tensor,
        right: Tensor | None,
        rows: Tensor,
        targets: Tensor | None,
        answers: Tensor | None,
    ) -> Tensor:
        """Return the contribution of n tokens to the loss of the batch (a scalar).

        Args:
            student, teacher: the results of both forwards, which compute logits from rows.
            tokens: the number of counted tokens in the whole batch, the divisor of the KL.
            right: the number of labels in the whole batch, the divisor of the cross entropy. None without it.
            rows: the student's rows `[n, X]`: last hidden states, or logits (see `Decoded.rows`).
            targets: the teacher's rows `[n, X]`. None without KL.
            answers: labels `[n]` int64. None without cross entropy.
        """
        logits = student.logits(rows)
        logits = logits.to(accumulator(logits.dtype))
        loss = logits.new_zeros(())
        if targets is not None:
            with torch.no_grad():
                target = teacher.logits(targets).to(logits.dtype).log_softmax(-1)
            loss = loss + self.weights.kl * (total_divergence(target, logits) / tokens)
        if answers is not None:
            total = cross_entropy(logits, answers, ignore_index=IGNORED, reduction="sum")
            loss = loss + self.weights.ce * (total / right)
        return loss


def mean_count(mask: Tensor) -> Tensor:
    """Return the number of True values, averaged over the processes. It is at least 1e-12, so it can be a
    divisor.
    """
    return process_mean(mask.sum().float()).clamp_min(TINY)


def relative_error(actual: Tensor, expected: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the squared error of a row's vectors relative to their mean square, averaged over the rows (a
    scalar).

    Args:
        actual, expected: vectors `[B, ..., X]` of B rows.
        counted: `[B, ...]` bool, the vectors to include. None means all.
    """
    actual, expected = (x.to(accumulator(x.dtype)) for x in (actual, expected))
    error, size = (actual - expected).square().mean(-1), expected.square().mean(-1)
    if counted is not None:
        error, size = error * counted, size * counted
    return (error.flatten(1).mean(1) / size.flatten(1).mean(1).clamp_min(TINY)).mean()


def last_hidden(output: ModelOutput) -> Tensor:
    """Return the last hidden states `[B, T, width]` from a model's output. An encoder-decoder gives its
    decoder's.
    """
    if STATES in output:  # of a model without a head
        return output[STATES]
    states = output.get("hidden_states") or output.decoder_hidden_states
    return states[-1]
