"""One conversion: load the teacher, swap its attention, recover the quality, check, save."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from linearize_cli.artifact.fingerprint import fingerprint, in_float32
from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.artifact.save import save_artifact, save_report
from linearize_cli.checksums import checksums
from linearize_cli.conversion.layer_selection import chosen_layers
from linearize_cli.conversion.plan import Memory, planned
from linearize_cli.conversion.preflight import check_blocks, check_space, hidden_bytes
from linearize_cli.conversion.recovery import Steps, recover
from linearize_cli.conversion.stages import Conversion
from linearize_cli.methods.registry import is_bundled
from linearize_cli.metrics.memory import kv_bytes_per_token, state_bytes
from linearize_cli.metrics.selfcheck import check_tokens, reload_difference, require_same, self_check
from linearize_cli.models.device import checked_dtype, in_working_dtype
from linearize_cli.models.find import resolve_model
from linearize_cli.models.load import load_stored
from linearize_cli.models.origin import origin
from linearize_cli.models.stored import dtypes, in_stored_dtypes
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.speculative.medusa import MedusaHeads
from linearize_cli.terminal import Terminal
from linearize_cli.training.checkpoint import FILE, Checkpoint, Session
from linearize_cli.training.engine import Engine
from linearize_cli.training.job import Job
from linearize_cli.training.medusa import LOG, train_heads
from linearize_cli.training.streamed_layers import LayerBlocks
from linearize_cli.training.text import NamedText
from linearize_cli.versions import versions

SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """The folders, the processes and the terminal of a conversion.

    Attributes:
        output: the final folder of the artifact.
        partial: the workspace in the same parent folder. The artifact is written to `partial/artifact`.
        engine: the training processes.
        terminal: the output to the user.
        memory: the bytes that each process may use. None: what the device has free.
    """

    output: Path
    partial: Path
    engine: Engine
    terminal: Terminal
    memory: int | None = None

    def budget(self) -> Memory:
        """Return the memory that each process may use. Processes on CPUs share that of the machine."""
        sharing = self.engine.processes if self.engine.device == "cpu" else 1
        return Memory.of(self.memory, self.engine.device, sharing)


def make_artifact(job: Job, place: Place, trust_remote_code: bool) -> dict[str, Any]:
    """Run a conversion, write the artifact to `partial/artifact` and return its report.

    Raises:
        UserError: the job, the model or the text cannot be used.
        CheckFailed: prefill, decoding or the reloaded model give different logits. Nothing is kept.
    """
    refuse_linearized(job.model)
    text = NamedText(job)
    conversion = prepare(job, text, place, trust_remote_code)
    conversion.measure_teacher()
    conversion.swap()
    conversion.calibrate()
    steps = Steps.of(conversion)
    if not steps.transfer:
        conversion.keep_softmax()
    conversion.measure("swapped")
    if conversion.text.train is not None:
        warn_short_blocks(conversion)
        place.engine.track(place.output.name, conversion.job.to_dict())
        recover(conversion, steps)
    conversion.ablate()
    heads, medusa = medusa_heads(conversion, steps) if job.medusa_heads else (None, None)
    place.engine.finish()
    report = make_report(conversion, steps, medusa)
    if place.engine.main:
        save(conversion, report, heads, place.output.name)
    text.bad.report(place.terminal)
    return report


def prepare(job: Job, text: NamedText, place: Place, trust_remote_code: bool) -> Conversion:
    """Plan the conversion, load the teacher and its tokenizer, choose the layers, and check the job. Sample the
    text of a `self` source.

    Raises:
        UserError: the job, the model or the text cannot be used.
    """
    engine, terminal = place.engine, place.terminal
    before = Checkpoint.load(place.partial / FILE).results.get("plan", {})
    memory = engine.on_main(place.budget)  # all processes must have the same plan
    known = planned(job, engine.device, engine.processes, memory, trust_remote_code, before)
    job, plan, length = known.job, known.plan, known.length
    terminal.note(plan.line(job, length))
    facts = origin(resolve_model(job.model, weights=False))
    model, tokenizer = load_stored(
        job.model, job.dtype, "cpu" if plan.block_layers else engine.home, trust_remote_code
    )
    stored = dtypes(model)
    if checked_dtype(job.dtype) is None:
        model = in_working_dtype(model, engine.device)
    linear, softmax = chosen_layers(job, model)
    task = task_of(model, tokenizer)
    text.read_through(tokenizer, task, terminal)
    by_block = None
    if plan.block_layers:
        by_block = LayerBlocks.of(model, [layer.name for layer in linear], plan.block_layers, engine.device)
        check_blocks(job, model, by_block, engine)
    engine.on_main(check_space, place.output, model, hidden_bytes(job, model, by_block))
    text.write_own(model, tokenizer, place.partial / "self.jsonl", length, terminal, engine)
    blocks = text.blocks(job, tokenizer, task, length, terminal)
    session = Session.open(engine, terminal, place.partial)
    session.checkpoint.results["plan"] = plan.to_dict()
    session.checkpoint.results["origin"] = facts
    session.micro.rows = plan.rows
    return Conversion(job, model, linear, softmax, blocks, session, stored, by_block)


def warn_short_blocks(conversion: Conversion) -> None:
    """Warn if the window covers a whole block, so that the linear part is not trained."""
    attention, length = conversion.job.recipe.attention, conversion.text.length
    if attention.far and attention.local and attention.local.size >= length:
        conversion.session.terminal.note(
            f"the window ({attention.local.size}) covers a whole block ({length}): the linear part is not "
            "trained. Raise --seq-len."
        )


def medusa_heads(conversion: Conversion, steps: Steps) -> tuple[MedusaHeads, dict[str, Any]]:
    """Train Medusa heads for the converted model, and return them with the facts about them for
    `linearize.json`.

    They have their own folder, because the checkpoint in the session's folder holds the model's parameters.
    """
    session, folder = conversion.session, conversion.session.folder / "heads"
    if session.engine.main:
        folder.mkdir(exist_ok=True)
    own = replace(Session.open(session.engine, session.terminal, folder, LOG), micro=session.micro)
    return train_heads(conversion.job, conversion.model.eval(), conversion.text, own, steps.total)


def make_report(conversion: Conversion, steps: Steps, medusa: dict[str, Any] | None) -> dict[str, Any]:
    """Return the contents of `linearize.json`, except the results of checks on the saved artifact.

    Args:
        steps: the planned steps of each stage.
        medusa: the facts about Medusa heads. None without heads.
    """
    job, text, results = conversion.job, conversion.text, conversion.results
    record = conversion.model.config.linearize
    done = {"transfer": steps.transfer, "distill": steps.distill} | results.get("steps", {})
    perplexities = ("teacher", "swapped", "transferred", "recovered")
    ablations = ("full", "local_only", "linear_only")
    compared = conversion.teacher is not None
    report = {
        "schema": SCHEMA,
        "base_model": job.model,
        "method": job.recipe.name,
        "layers": {"linear": list(record["layers"]), "softmax": record["softmax"]},
        "seq_len": text.length,
        "tokens": {stage: count * text.tokens_per_step or None for stage, count in done.items()},
        "perplexity": dict.fromkeys(perplexities) if compared else conversion.selected(*perplexities),
        "ablation": dict.fromkeys(ablations) if compared else conversion.selected(*ablations),
        "keep_softmax": results.get("keep_softmax"),
        "self_check": {},
        "state_bytes": state_bytes(conversion.model, conversion.dtype),
        "kv_bytes_per_token": kv_bytes_per_token(conversion.linear, conversion.dtype),
        "seconds": results.get("seconds", {}),
        "plan": results["plan"],
        "command": job.command(is_bundled(job.recipe, job.overrides)),
        "origin": results["origin"],
        "versions": versions(),
    }
    if medusa is not None:
        report["medusa"] = medusa
    if not isinstance(text.task, CausalLM):
        report["task"] = text.task.pipeline
    if compared:
        report[text.task.metric] = conversion.selected(*perplexities[1:], *ablations[1:])
    return report


def save(conversion: Conversion, report: dict[str, Any], heads: MedusaHeads | None, name: str) -> None:
    """Write the artifact, load it again, check it, and complete its report.

    Args:
        report: the contents of `linearize.json`, which get the checks' results, the fingerprint and the
            checksums.
        heads: the Medusa heads to save. None for none.
        name: the artifact's name in its model card.

    Raises:
        CheckFailed: the saved model differs from the one in memory, or its prefill from its decoding. The
            message says which and by how much.
    """
    started, partial, text = time.monotonic(), conversion.session.folder, conversion.text
    model, folder = conversion.model.eval(), partial / "artifact"
    dtype, place = model.dtype, model.device
    shutil.rmtree(folder, ignore_errors=True)
    with in_stored_dtypes(model, conversion.stored):
        stored = model.dtype
        save_artifact(folder, model, text.tokenizer, conversion.job.recipe)
    text.task.save(folder)
    if (partial / "adapter").exists():
        (partial / "adapter").rename(folder / "adapter")
    if heads is not None:
        heads.save(folder, stored)
        shutil.copy(partial / "heads" / LOG, folder)
    with conversion.on_device(model):
        ids = check_tokens(model, text.held_out).to(model.device)
        differences, logits = self_check(text.task, model, ids)
    model.to("meta")  # there may be no memory for two models
    auto_class = getattr(transformers, text.task.auto_class)
    loaded = auto_class.from_pretrained(folder, dtype=stored).to(place).eval()
    if dtype != stored:
        loaded.to(dtype)
    with conversion.on_device(loaded):
        differences["reload"] = reload_difference(text.task, loaded, ids, logits)
        require_same(differences, logits)
        report["self_check"] = differences
        # Streamed layers keep their dtype: the host might not hold a copy in fp32.
        exact = loaded if conversion.by_block else in_float32(loaded) or loaded
        report["fingerprint"] = fingerprint(text.task, exact, text.tokenizer)
    report["checksums"] = checksums(folder)
    conversion.add_seconds("check and save", started)
    report["seconds"] = conversion.results["seconds"]
    save_report(folder, name, conversion.job.recipe, report)
    shutil.copy(partial / "log.jsonl", folder)
