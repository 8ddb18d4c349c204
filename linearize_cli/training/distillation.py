"""Distillation: the linearized model learns its softmax teacher's logits."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from linearize_kernels.equation import accumulator
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from linearize_cli.methods.recipe import Distill
from linearize_cli.models.batch import IGNORED, Batch
from linearize_cli.runtime.dispatch import attention_implementation
from linearize_cli.training.chunked_logits import Decoded, decode, whole
from linearize_cli.training.objective import Objective
from linearize_cli.training.parallel import process_mean

TINY = 1e-12  # in the place of a 0 that nothing is divided into
LOGITS = 1 << 26  # of teacher and student each, more are never held at once: 256 MB in fp32


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher ‖ student), a mean over all logits: the teacher's log-probabilities and the student's logits
    `[..., vocab]`.
    """
    return total_divergence(teacher, logits) / logits[..., 0].numel()


def total_divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    return kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")


class Distillation(Objective):
    """The objective of distillation: a batch ->
    `kl · KL(teacher ‖ student) + ce · cross entropy + hidden · error of the last hidden states`.

    The KL is the mean over all logits that count, the cross entropy that over the right answers, the error the
    squared one relative to the teacher's mean square. Without a teacher of its own, the teacher is the same model
    with its softmax attention back and LoRA off: its weights are held once.

    Where a batch has more than `limit` logits, they are made of the last hidden states and compared a few tokens at
    a time, and once more in the backward: the memory for them does not grow with the batch.
    """

    def __init__(
        self,
        student: PeftModel | PreTrainedModel,
        native: str,
        weights: Distill,
        teacher: PreTrainedModel | None = None,
        limit: int = LOGITS,
    ):
        super().__init__()
        self.student, self.native, self.weights, self.teacher = student, native, weights, teacher
        self.limit = limit

    @property
    def model(self) -> PreTrainedModel:
        return self.student.get_base_model() if isinstance(self.student, PeftModel) else self.student

    @contextmanager
    def teaching(self) -> Iterator[PreTrainedModel]:
        """While open, the yielded model is the teacher."""
        model = self.teacher or self.model
        off = nullcontext() if self.teacher else self.student.disable_adapter()
        with torch.no_grad(), attention_implementation(model, self.native), off:
            yield model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        weights, vocabulary = self.weights, self.model.config.get_text_config().vocab_size
        inputs = batch.inputs | ({"output_hidden_states": True} if weights.hidden else {})
        large = batch.labels is not None and batch.labels.numel() * vocabulary > self.limit
        run = decode if large else whole
        student, teacher = run(self.model, inputs), None
        if weights.kl or weights.hidden:
            with self.teaching() as model:
                teacher = run(model, inputs)
        loss = self.token_loss(student, teacher, batch, max(1, self.limit // vocabulary))
        if weights.hidden:
            states = last_hidden(student.output), last_hidden(teacher.output)
            loss = loss + weights.hidden * relative_error(*states, batch.counted)
        return loss, {}

    def token_loss(self, student: Decoded, teacher: Decoded | None, batch: Batch, size: int) -> Tensor:
        """The terms that are means over tokens; the logits of `size` tokens at a time unless they are there."""
        rows, targets, answers = student.rows(batch.counted), None, None
        if self.weights.kl:
            targets = teacher.rows(batch.counted)
        if self.weights.ce:
            answers = batch.labels.flatten() if batch.counted is None else batch.labels[batch.counted]
        # Processes may have different numbers of them; the mean of their losses is then that of the whole batch.
        tokens = len(rows) if batch.counted is None else mean_count(batch.counted)
        right = None if answers is None else mean_count(answers != IGNORED)
        part = partial(self.part, student, teacher, tokens, right)
        if not student.parts:
            return part(rows, targets, answers)
        pieces = rows.split(size)
        others = ([None] * len(pieces) if x is None else x.split(size) for x in (targets, answers))
        again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        return sum(again(*piece) for piece in zip(pieces, *others, strict=True))

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
        """What some rows add to the means over the batch's `tokens` and its `right` answers."""
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
    """How many are true on average over the processes; never 0."""
    return process_mean(mask.sum().float()).clamp_min(TINY)


def relative_error(actual: Tensor, expected: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean squared error, relative to the mean square of what is expected: `[..., X]`, of all vectors or of those
    that are `counted`, `[...]` bool.
    """
    actual, expected = (x.to(accumulator(x.dtype)) for x in (actual, expected))
    error, size = (actual - expected).square().mean(-1), expected.square().mean(-1)
    if counted is not None:
        error, size = error * counted, size * counted
    return error.mean() / process_mean(size.mean()).clamp_min(TINY)


def last_hidden(output: ModelOutput) -> Tensor:
    """`[B, T, width]`, of the decoder where there is one."""
    states = output.get("hidden_states") or output.decoder_hidden_states
    return states[-1]
