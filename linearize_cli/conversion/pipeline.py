"""One conversion, from the loaded teacher to a checked artifact."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.checksums import checksums
from linearize_cli.artifact.fingerprint import fingerprint, in_float32
from linearize_cli.artifact.save import save_artifact, save_report
from linearize_cli.conversion.document_check import check_apart
from linearize_cli.conversion.layer_selection import conversion_record, copy_biases, measured_count
from linearize_cli.conversion.softmax_selection import ROWS, Restorer, best
from linearize_cli.data import sources as text
from linearize_cli.data.tokenize import marks_assistant
from linearize_cli.methods.recipe import Stage, learning_rates, transfer_rate
from linearize_cli.metrics.ablation import ABLATIONS, has_both_parts, without
from linearize_cli.metrics.memory import kv_bytes_per_token, state_bytes
from linearize_cli.metrics.perplexity import log_probabilities, perplexity
from linearize_cli.metrics.selfcheck import check_tokens, require_same, self_check
from linearize_cli.models.batch import Batch, Blocks
from linearize_cli.models.layer import Layer
from linearize_cli.models.tasks import CausalLM, Task
from linearize_cli.runtime import linearize
from linearize_cli.runtime.model import linear_parameters
from linearize_cli.speculative.medusa import check_heads
from linearize_cli.terminal import Terminal
from linearize_cli.training.attention_transfer import Transfer, WindowDropout
from linearize_cli.training.distillation import Distillation, divergence
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job
from linearize_cli.training.layerwise_transfer import transfer_by_blocks
from linearize_cli.training.loop import Checkpoint, Log, train
from linearize_cli.training.medusa import LOG, make_heads
from linearize_cli.training.objective import Objective
from linearize_cli.training.streamed_layers import LayerBlocks
from linearize_cli.training.student import merge, recomputed, student_and_teacher
from linearize_cli.versions import versions

SCHEMA = 1
LOOKED_AT = 64  # blocks of held-out text that the best parameters are chosen by


class Run:
    """One conversion, from the loaded teacher to the artifact in `partial/artifact`."""

    def __init__(
        self,
        job: Job,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        linear: list[Layer],
        softmax: list[Layer],
        length: int,
        partial: Path,
        terminal: Terminal,
        engine: Engine,
        by_block: LayerBlocks | None = None,
    ):
        self.by_block = by_block
        self.job, self.model, self.tokenizer, self.terminal = job, model, tokenizer, terminal
        self.task, self.teacher, self.heads, self.engine = task, None, None, engine
        self.linear, self.softmax, self.length, self.partial = linear, softmax, length, partial
        path = partial / "checkpoint.pt"
        self.checkpoint = Checkpoint.load(path) if path.exists() else Checkpoint()
        self.log = Log(partial / "log.jsonl", self.checkpoint.log_bytes, engine)
        self.restorer = Restorer(model, [layer.name for layer in linear], task.batch)
        self.native = self.restorer.native
        steps = job.recipe.recover.tokens // self.tokens_per_step if job.train else 0
        self.steps = {"transfer": round(steps * job.recipe.recover.transfer.share), "distill": steps}

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.job.batch_size

    def all(self, train_text: text.Source | None, eval_text: text.Source | None, name: str) -> dict[str, Any]:
        blocks = None
        if eval_text is not None:
            limit = None if self.job.eval_data else text.HELD_OUT_LIMIT
            blocks = text.evaluation_blocks(eval_text, self.tokenizer, self.length, limit)
        if blocks is not None and not self.task.answers:
            common = (self.engine.inference(self.model), blocks, self.job.batch_size)
            with self.running(self.model), self.terminal.progress("teacher", blocks.numel()) as advance:
                self.teacher = log_probabilities(*common, advance, self.task)
        else:
            self.measure("teacher", blocks)
        torch.manual_seed(self.job.seed)
        record = conversion_record(self.model, self.job.recipe, self.linear, self.softmax)
        linearize(self.model, record)
        copy_biases(self.model, self.linear)
        if self.job.train:
            self.check_text()
        if self.job.medusa_heads:
            with self.running(self.model):
                check_heads(self.model, type(self.task))
        if not linear_parameters(self.model):
            self.steps["transfer"] = 0
        self.steps["distill"] -= self.steps["transfer"]
        if not self.steps["transfer"]:
            self.keep_softmax(train_text, blocks)
        self.measure("swapped", blocks)
        if train_text is not None:
            local = self.job.recipe.attention.local
            if self.job.recipe.attention.far and local and local.size >= self.length:
                self.terminal.note(
                    f"the window ({local.size}) is as long as a block ({self.length}): the linear part sees nothing "
                    "and learns nothing; raise --seq-len"
                )
            self.engine.track(name, self.job.to_dict())
            self.recover(train_text, blocks)
        self.ablate(blocks)
        medusa = self.train_heads(train_text, blocks) if self.job.medusa_heads else None
        self.engine.finish()
        report = {
            "schema": SCHEMA,
            "base_model": self.job.model,
            "method": self.job.recipe.name,
            "layers": {"linear": list(record["layers"]), "softmax": record["softmax"]},
            "seq_len": self.length,
            "tokens": {stage: steps * self.tokens_per_step or None for stage, steps in self.done().items()},
            "perplexity": self.results("teacher", "swapped", "transferred", "recovered"),
            "ablation": self.results("full", "local_only", "linear_only"),
            "keep_softmax": self.checkpoint.results.get("keep_softmax"),
            "self_check": {},
            "state_bytes": state_bytes(self.model),
            "kv_bytes_per_token": kv_bytes_per_token(self.linear, self.model.dtype),
            "seconds": self.checkpoint.results.get("seconds", {}),
            "versions": versions(),
        }
        if medusa is not None:
            report["medusa"] = medusa
        if not isinstance(self.task, CausalLM):
            report["task"] = self.task.pipeline
        if self.teacher is not None:
            names = ("swapped", "transferred", "recovered", "local_only", "linear_only")
            report["kl"] = {name: self.checkpoint.results.get(name) for name in names}
        if self.engine.main:
            self.save(name, report, blocks)
        return report

    def done(self) -> dict[str, int]:
        """Steps of each stage; fewer than planned where it ended early."""
        return self.steps | self.checkpoint.results.get("steps", {})

    def results(self, *names: str) -> dict[str, float | None]:
        """Perplexities by name."""
        return {
            name: None if self.teacher is not None else self.checkpoint.results.get(name) for name in names
        }

    def measure(self, name: str, blocks: torch.Tensor | None, title: str | None = None) -> None:
        """Perplexity under a name, unless an interrupted run measured it already; where text has no answers,
        the divergence from the teacher.
        """
        if blocks is None or name in self.checkpoint.results:
            return
        started = time.monotonic()
        measure = "perplexity" if self.teacher is None else "kl"
        title = f"{measure}, {title or name}"
        with self.running(self.model), self.terminal.progress(title, blocks.numel()) as advance:
            model = self.engine.inference(self.model)
            common = (model, blocks, self.job.batch_size, advance, self.task)
            if self.teacher is None:
                value = perplexity(*common)
            else:
                value = divergence(self.teacher, log_probabilities(*common)).item()
        self.checkpoint.results[name] = value
        self.took("measure", started)
        self.log.write("measure", name, **{measure: value})
        self.terminal.note(f"{title}: {value:.4f}")

    def running(self, model: PreTrainedModel) -> AbstractContextManager:
        """While open, a forward of the whole model runs on the device, wherever its weights are."""
        return self.by_block.streamed(model) if self.by_block else nullcontext()

    def took(self, stage: str, started: float) -> None:
        seconds = self.checkpoint.results.setdefault("seconds", {})
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 1)

    def stream(self, source: text.Source, skip: int = 0) -> Iterator[Blocks]:
        """The training text in batches, `skip` of them left out."""
        size, recover = self.job.batch_size, self.job.recipe.recover
        return text.stream(source, self.tokenizer, self.length, size, recover, skip)

    def batches_from(self, source: text.Source, start: int) -> Callable[[int], Iterator[Batch]]:
        """This process's rows of the training text behind `start` batches, as `train` wants them."""

        def batches(done: int) -> Iterator[Batch]:
            stream = self.stream(source, start + done)
            return (self.task.batch(self.engine.share(blocks)) for blocks in stream)

        return batches

    def check_text(self) -> None:
        """See that the model and its tokenizer can do with text what the recipe wants.

        Raises:
            UserError: the model does not keep documents apart.
        """
        recover = self.job.recipe.recover
        if recover.separate_documents:
            with self.running(self.model):
                check_apart(self.model, self.native)
        if recover.assistant_only and not marks_assistant(self.tokenizer):
            self.terminal.note("the chat template does not mark what the assistant says: all tokens count")

    def keep_softmax(self, source: text.Source | None, blocks: torch.Tensor | None) -> None:
        """Give the layers that `--keep-softmax auto:N` is to choose back to softmax. Of a run with transfer, the
        perplexity `swapped` is therefore that with every layer linear, and those that follow are the hybrid's.
        """
        # After transfer: a layer that has learned its teacher's attention shows what the linear form cannot do,
        # one just swapped mostly what it has not learned yet. Transfer itself needs no choice, for its layers
        # are independent; distillation does, for the others learn to work with the kept ones.
        count, results = measured_count(self.job.keep_softmax), self.checkpoint.results
        if not count:
            return
        if "keep_softmax" not in results:
            started, size = time.monotonic(), self.job.batch_size
            stream = blocks.split(size) if source is None else self.stream(source)
            batches = [ids.to(self.engine.device) for ids in islice(stream, -(-ROWS // size))]
            total = sum(ids.numel() for ids in batches) * (1 + len(self.linear))
            with self.running(self.model), self.terminal.progress("KL by layer", total) as advance:
                kl = self.restorer.divergences(self.engine.inference(self.model), batches, advance)
            # Rounding may differ between processes; the choice must not.
            results["keep_softmax"] = self.engine.on_main(lambda: {"kl": kl, "kept": best(kl, count)})
            self.took("measure", started)
            self.log.write("keep_softmax", **results["keep_softmax"])
            self.terminal.note(f"kept softmax, by KL: {', '.join(results['keep_softmax']['kept'])}")
        kept = results["keep_softmax"]["kept"]
        self.restorer.restore(kept)
        self.linear = [layer for layer in self.linear if layer.name not in kept]

    def recover(self, source: text.Source, blocks: torch.Tensor | None) -> None:
        """Transfer, then distill, then merge."""
        recipe = self.job.recipe.recover

        def held_out() -> Iterator[Batch]:
            first = blocks[:LOOKED_AT].split(self.job.batch_size)
            return (self.task.batch(ids.to(self.engine.device)) for ids in first)

        def stage(name: str, objectives: Iterable[Objective], options: Stage, start: int) -> None:
            started, batches = time.monotonic(), self.batches_from(source, start)
            common = (self.checkpoint, self.partial, self.terminal, self.log, self.engine, held_out)
            for objective in objectives:
                train(name, objective, batches, self.steps[name], self.tokens_per_step, options, *common)
            self.took(name, started)

        self.model.requires_grad_(False)
        for parameter in linear_parameters(self.model):
            parameter.requires_grad_(True)
        if self.steps["transfer"] and self.checkpoint.stage != "distill":
            windows = WindowDropout(recipe.transfer.window_dropout, self.steps["transfer"], self.job.seed)
            if self.by_block:
                progress = (
                    self.batches_from(source, 0),
                    self.steps["transfer"],
                    self.checkpoint,
                    self.partial,
                    self.engine,
                )
                objectives = transfer_by_blocks(self.model, self.native, windows, self.by_block, *progress)
            else:
                objectives = [Transfer(self.model, self.native, windows)]
            lr = transfer_rate(recipe.transfer, min(layer.geometry["key_dim"] for layer in self.linear))
            stage("transfer", objectives, recipe.transfer.model_copy(update={"lr": lr}), 0)
        if self.steps["transfer"]:
            self.keep_softmax(source, blocks)
            self.measure("transferred", blocks)
        if self.steps["distill"]:
            if self.by_block:  # whole on the device, from here on
                self.model.to(self.by_block.device)
                self.by_block = None
            student, teacher = student_and_teacher(self.model, recipe.distill.lora)
            lr, linear_lr = learning_rates(recipe.distill, self.model.config.get_text_config().hidden_size)
            objective = Distillation(student, self.native, recipe.distill, teacher)
            with recomputed(student) if recipe.distill.checkpointing else nullcontext():
                options = recipe.distill.model_copy(update={"lr": lr, "linear_lr": linear_lr})
                stage("distill", [objective], options, self.steps["transfer"])
            if self.job.keep_adapter and self.engine.main:
                student.save_pretrained(self.partial / "adapter")
                (self.partial / "adapter/README.md").unlink(missing_ok=True)  # an empty card
            self.model = merge(student)
        self.model.requires_grad_(False)
        self.measure("recovered", blocks)

    def ablate(self, blocks: torch.Tensor | None) -> None:
        """Perplexity with either part left out, of models that have both."""
        results = self.checkpoint.results
        last = results.get("recovered", results.get("swapped"))
        if blocks is None or not has_both_parts(self.model):
            return
        results["full"] = last
        for name, part in ABLATIONS.items():
            with without(self.model, part):
                self.measure(name, blocks, name.replace("_", " "))

    def train_heads(self, source: text.Source, blocks: torch.Tensor) -> dict[str, Any]:
        """Medusa heads for the converted model, in a folder of their own: the checkpoint beside it keeps what the
        model has learned.
        """
        folder = self.partial / "heads"
        if self.engine.main:
            folder.mkdir(exist_ok=True)
        batches = self.batches_from(source, sum(self.steps.values()))
        common = (blocks, self.length, folder, self.terminal, self.engine)
        self.heads, facts = make_heads(self.job, self.model.eval(), batches, *common)
        return facts

    def save(self, name: str, report: dict[str, Any], blocks: torch.Tensor | None) -> None:
        """Write the artifact, load it again, and refuse it if the forms of the model disagree.

        Raises:
            CheckFailed: which forms, by how much.
        """
        started = time.monotonic()
        model, folder = self.model.eval(), self.partial / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        save_artifact(folder, model, self.tokenizer, self.job.recipe)
        if (self.partial / "adapter").exists():
            (self.partial / "adapter").rename(folder / "adapter")
        if self.heads is not None:
            self.heads.save(folder, model.dtype)
            shutil.copy(self.partial / "heads" / LOG, folder)
        auto_class = getattr(transformers, self.task.auto_class)
        again = auto_class.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
        with self.running(model), self.running(again):
            ids = check_tokens(model, blocks).to(model.device)
            differences, limit = self_check(self.task, model, again, ids)
            require_same(differences, limit)
            report["self_check"] = differences
            # Layers that are streamed to the device stay in their dtype: a copy in fp32 might not fit the host.
            exact = again if self.by_block else in_float32(again) or again
            report["fingerprint"] = fingerprint(self.task, exact, self.tokenizer)
        report["checksums"] = checksums(folder)
        self.took("check and save", started)
        report["seconds"] = self.checkpoint.results["seconds"]
        save_report(folder, name, self.job.recipe, report)
        shutil.copy(self.partial / "log.jsonl", folder)
