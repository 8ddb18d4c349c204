"""The stages of a conversion without training: swap, measurements, selection of layers, ablation."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize_cli.conversion.document_check import check_document_masking
from linearize_cli.conversion.layer_selection import conversion_record, copy_biases, measured_count
from linearize_cli.conversion.softmax_selection import REPEATED, ROWS, TOKENS, Restorer, best, repeated
from linearize_cli.data.tokenize import marks_assistant
from linearize_cli.metrics.ablation import ABLATIONS, has_both_parts, without
from linearize_cli.metrics.perplexity import observations, perplexity
from linearize_cli.models.batch import Blocks
from linearize_cli.models.layer import Layer
from linearize_cli.runtime import linearize
from linearize_cli.speculative.medusa import check_heads
from linearize_cli.training.calibration import calibrate, decaying
from linearize_cli.training.checkpoint import Session
from linearize_cli.training.job import Job
from linearize_cli.training.streamed_layers import LayerBlocks
from linearize_cli.training.text import TextBlocks

CALIBRATED, LONGEST = 8, 1024  # blocks of text that set the decays, and the most tokens of each


@dataclass
class Conversion:
    """The state of one conversion.

    Attributes:
        job: the run configuration.
        model: the teacher until `swap`, then the linearized model.
        linear, softmax: the layers that become linear, and those that stay softmax.
        text: the training text and the held-out text.
        session: the processes, the checkpoint and the log.
        stored: the dtype in which each weight of the checkpoint is stored, by name. The artifact keeps it.
        by_block: the blocks of layers that are copied to the device one by one. None if the whole model is on
            the device.
        teacher: what the teacher computes on the held-out blocks (`Task.observe`), if the task has no labels
            and quality is measured by the distance from the teacher. Otherwise None.
    """

    job: Job
    model: PreTrainedModel
    linear: list[Layer]
    softmax: list[Layer]
    text: TextBlocks
    session: Session
    stored: dict[str, torch.dtype]
    by_block: LayerBlocks | None = None
    teacher: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.linear]
        self.restorer = Restorer(self.model, names)
        self.results = self.session.checkpoint.results

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the checkpoint is stored in."""
        return next(dtype for dtype in self.stored.values() if dtype.is_floating_point)

    @property
    def native(self) -> str:
        """Return the name of the base model's attention implementation."""
        return self.restorer.native

    def on_device(self, model: PreTrainedModel) -> AbstractContextManager:
        """Let the whole model run on the device while the context is open. Layers that are not there are
        copied when needed.
        """
        return self.by_block.streamed(model) if self.by_block else nullcontext()

    def measure_teacher(self) -> None:
        """Measure the teacher's perplexity. If the task has no labels, keep its outputs instead."""
        blocks, session = self.text.held_out, self.session
        if blocks is None or self.text.task.answers:
            self.measure("teacher")
            return
        model = session.engine.inference(self.model)
        with self.on_device(self.model), session.terminal.progress("teacher", blocks.numel()) as advance:
            self.teacher = session.in_memory(
                lambda rows: observations(model, blocks, rows, advance, self.text.task), self.job.batch_size
            )

    def measure(self, name: str, title: str | None = None) -> None:
        """Measure the perplexity, or the distance from the teacher, and record it under a name.

        It is skipped without held-out text, or if an interrupted run has already measured it.

        Args:
            title: the name in messages. None uses `name`.
        """
        blocks, session = self.text.held_out, self.session
        if blocks is None or name in self.results:
            return
        started = time.monotonic()
        task = self.text.task
        metric = "perplexity" if self.teacher is None else task.metric
        title = f"{metric.replace('_', ' ')}, {title or name}"
        model = session.engine.inference(self.model)
        with self.on_device(self.model), session.terminal.progress(title, blocks.numel()) as advance:

            def quality(rows: int) -> float:
                inputs = (model, blocks, rows, advance, task)
                teacher = self.teacher
                return (
                    perplexity(*inputs) if teacher is None else task.distance(teacher, observations(*inputs))
                )

            value = session.in_memory(quality, self.job.batch_size)
        self.results[name] = value
        self.add_seconds("measure", started)
        session.log.write("measure", name, **{metric: value})
        session.terminal.note(f"{title}: {value:.4f}")

    def add_seconds(self, stage: str, started: float) -> None:
        """Add the time since `started` to the recorded seconds of a stage.

        Args:
            started: a reading of `time.monotonic`.
        """
        seconds = self.results.setdefault("seconds", {})
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 1)

    def swap(self) -> None:
        """Replace the attention of the chosen layers, and check that the model can be trained as requested.

        Raises:
            UserError: document masking fails, or Medusa heads do not suit the model.
        """
        torch.manual_seed(self.job.seed)
        linearize(self.model, conversion_record(self.model, self.job.recipe, self.linear, self.softmax))
        copy_biases(self.model, self.linear)
        recover = self.job.recipe.recover
        with self.on_device(self.model):
            if self.job.train and recover.separate_documents:
                check_document_masking(self.model, self.native)
            if self.job.medusa_heads:
                check_heads(self.model, type(self.text.task))
        if self.job.train and recover.assistant_only and not marks_assistant(self.text.tokenizer):
            self.session.terminal.note(
                "the chat template does not mark the assistant's words, so all tokens are trained on"
            )

    def calibrate(self) -> None:
        """Set the decays of linear attention from the teacher's attention on a few blocks of text. Do nothing
        if the method has none, if the recipe says no, without text, or with sharded parameters.
        """
        wanted = self.job.recipe.recover.transfer.calibrate and decaying(self.model)
        if not wanted or self.session.engine.plugin is not None or self.text.held_out is None:
            return
        cut = (
            (blocks if isinstance(blocks, Blocks) else Blocks(blocks)).map(lambda x: x[:, :LONGEST])
            for blocks in self.sample(CALIBRATED)
        )
        batches = list(map(self.text.task.batch, cut))
        total = sum(batch.inputs["input_ids"].numel() for batch in batches)
        with (
            self.on_device(self.model),
            self.session.terminal.progress("calibrate", total) as advance,
        ):
            calibrate(self.model, self.native, chain.from_iterable(x.parts(1) for x in batches), advance)

    def sample(self, rows: int) -> list[Tensor | Blocks]:
        """Return about `rows` blocks of the training text in batches on the device, or of the held-out text if
        nothing is trained.
        """
        size = self.job.batch_size
        stream = self.text.held_out.split(size) if self.text.train is None else self.text.stream()
        return [ids.to(self.session.engine.device) for ids in islice(stream, -(-rows // size))]

    def keep_softmax(self) -> None:
        """Choose the layers of `--keep-softmax auto:N` by their distance from the teacher, and give them their
        softmax attention back. Do nothing otherwise. Only causal language models are measured on repeated text.

        It runs after transfer. A layer just swapped would mostly show what it has not learned yet, while a
        trained layer shows what the linear form cannot compute. It runs before distillation, in which the
        remaining linear layers adapt to those kept softmax.
        """
        count, session, task = measured_count(self.job.keep_softmax), self.session, self.text.task
        if not count:
            return
        if "keep_softmax" not in self.results:
            started, batches = time.monotonic(), self.sample(min(ROWS, -(-TOKENS // self.text.length)))
            texts = {task.metric: batches}
            if task.decodes and not task.encodes:
                texts[REPEATED] = repeated(batches)
            total = sum(ids.numel() for ids in chain(*texts.values())) * (1 + len(self.linear))
            model = session.engine.inference(self.model)
            with self.on_device(self.model), session.terminal.progress("distance by layer", total) as advance:
                found = {
                    name: self.restorer.distances(task, model, text, advance) for name, text in texts.items()
                }
            # Rounding may differ between processes, but the choice must not.
            chosen = session.engine.on_main(lambda: {**found, "kept": best([*found.values()], count)})
            self.results["keep_softmax"] = chosen
            self.add_seconds("measure", started)
            session.log.write("keep_softmax", **chosen)
            session.terminal.note(f"layers kept as softmax: {', '.join(chosen['kept'])}")
        kept = self.results["keep_softmax"]["kept"]
        self.restorer.restore(kept)
        self.linear = [layer for layer in self.linear if layer.name not in kept]

    def ablate(self) -> None:
        """Measure the model without its local part, and without its linear part. Do nothing if it lacks one
        of them.
        """
        if self.text.held_out is None or not has_both_parts(self.model):
            return
        self.results["full"] = self.results.get("recovered", self.results.get("swapped"))
        for name, part in ABLATIONS.items():
            with without(self.model, part):
                self.measure(name, name.replace("_", " "))

    def selected(self, *names: str) -> dict[str, float | None]:
        """Return the measured values with these names. A value that was not measured is None."""
        return {name: self.results.get(name) for name in names}
