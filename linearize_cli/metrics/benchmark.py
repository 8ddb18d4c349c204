"""`bench`: the speed and memory of an artifact, compared with its softmax teacher."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import check_artifact, load
from linearize_cli.artifact.record import read_record, summed
from linearize_cli.artifact.save import refresh_card
from linearize_cli.artifact.teacher import original_model, teacher_name
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, write_json
from linearize_cli.hub import brief
from linearize_cli.inputs import user_path
from linearize_cli.metrics import plots
from linearize_cli.metrics.speed import PHASES, measure, unmeasured
from linearize_cli.metrics.timing import machine, one_thread
from linearize_cli.models.positions import context_length, last_position
from linearize_cli.models.tasks import task_of
from linearize_cli.tables import number, size, table
from linearize_cli.terminal import Terminal
from linearize_cli.versions import versions

SCHEMA = 1
LENGTHS = (1, 2, 4, 8)  # default contexts, in multiples of the trained length
SHORTEST = 8  # tokens of the shortest context allowed
SECONDS = 60.0  # time for all repeats together


def bench(
    artifact: str | Path = ".",
    *,
    teacher: str | None = None,
    context: Sequence[int] = (),
    batch: Sequence[int] = (1,),
    phases: Sequence[str] = (),
    plot: str | Path | None = None,
    seconds: float = SECONDS,
    trust_remote_code: bool = False,
    checksums: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Time an artifact and its softmax teacher, and write `bench.json` and a figure (`linearize bench`).

    Both models run in turn, in one process, on one CPU thread, over random tokens. The phases are prefill,
    decode and train (see `metrics.speed`).

    Args:
        artifact: the artifact's folder.
        teacher: the softmax model that the artifact was made from. None uses the one that linearize.json
            names.
        context: lengths of a row in tokens. If empty, 1, 2, 4 and 8 times the trained length are measured, as
            far as both models have positions and the time allows.
        batch: numbers of rows in a batch.
        phases: the phases to measure, of `prefill`, `decode` and `train`. If empty, all.
        plot: another file for the figure, besides `bench.png` in the artifact.
        seconds: time for all repeats together. Contexts that were asked for run at least once.
        trust_remote_code: allow both models to run their own code.
        checksums: False to load files that differ from the artifact's checksums.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: the name of the torch dtype to run in. None uses the artifact's.
        seed: the seed of the random tokens.
        write: write the report and the figure into the artifact.

    Returns:
        The contents of `bench.json`. Each row has a `model`, `phase`, `context` and `batch`, and:
            seconds: the median over `repeats` of one forward, one decoding step, or one forward and backward.
            tokens_per_s: the throughput of all rows of the batch together.
            peak_bytes: the peak memory of the weights, the initial cache and all tensors allocated during the
                run. None on devices other than CPU and CUDA.
            state_bytes: the size of the cache of all rows after the context, or None without a cache.
            reason: why the numbers are None (out of memory, positions or time), or None if they were
                measured.

    Raises:
        UserError: the artifact or the teacher cannot be loaded, an argument is out of range, or a file cannot
            be written. No partly written file is left.
    """
    terminal, folder = terminal or Terminal(quiet=True), user_path(artifact)
    check_artifact(folder)
    record = read_record(folder)
    base = teacher_name(folder, record, teacher)
    check_sizes(context, batch)
    named = [user_path(plot)] if plot else []
    figures = named + ([folder / "bench.png"] if write else [])
    if write:
        check_writable(folder / "bench.json")
    for figure in figures:
        check_writable(figure, "--plot" if figure in named else "")
    if any(figure.suffix.lower() != ".png" for figure in named):
        raise UserError(f"--plot {named[0]} is not a PNG file", "Name a file that ends in .png.")
    student, tokenizer = load(
        folder.resolve(),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        checksums=checksums,
    )
    original = original_model(folder, base, student, tokenizer, dtype, device, trust_remote_code)
    models, task = {"teacher": original, "student": student}, task_of(student, tokenizer)
    limit = min(last_position(model) or 1 << 60 for model in models.values())
    contexts, batches = list(dict.fromkeys(context)), list(dict.fromkeys(batch))
    if not contexts:
        trained = record.get("seq_len") or min(1024, context_length(student))
        contexts = [times * trained for times in LENGTHS if times * trained <= limit] or [limit]
    shape = max(batches), min(max(contexts), limit)
    try:
        ids = random_tokens(student, tokenizer, shape, seed)
    except (RuntimeError, MemoryError) as error:
        what = f"not enough memory for {shape[0]:,} rows of {shape[1]:,} tokens: {brief(error)}"
        raise UserError(what, "Use a smaller --context or --batch.") from None
    cells = [(rows, length) for rows in batches for length in contexts]
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise UserError(f"bench has no phase {unknown[0]!r}", f"Its phases are {', '.join(PHASES)}.")
    wanted = [phase for phase in PHASES if phase in phases or not phases]
    wanted = [phase for phase in wanted if phase != "decode" or task.decodes]
    if not wanted:
        raise UserError("--phase decode: this model does not decode", "Use --phase prefill or --phase train.")
    share, ends = seconds / (len(cells) * len(wanted)), time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    gc.collect()  # older garbage that is freed during a measurement would falsify the peak
    with one_thread():
        on = machine(student.device)
        for many, length in cells:
            reason = None
            if length > limit:
                reason = f"beyond the {limit:,} positions that the model has learned"
            elif rows and not context and time.perf_counter() > ends:
                reason = f"not run within {seconds:g} seconds: ask for it with --context {length}"
            for phase in wanted:
                if reason:
                    rows += [unmeasured(name, phase, length, many, reason) for name in models]
                else:
                    terminal.note(f"{phase}, {length:,} tokens, batch {many}")
                    rows += measure(phase, task, models, ids[:many, :length].contiguous(), share)
                    terminal.note(f"  {rates(*rows[-2:])}")
    report = {
        "schema": SCHEMA,
        "machine": on,
        "teacher": base,
        "method": record.get("method"),
        "attention": original.config._attn_implementation,
        "rows": rows,
        "dtype": str(student.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }
    report = summed(report)
    for figure in figures:
        plots.save(plots.by_context(report), figure)
    if write:
        write_json(folder / "bench.json", report)
        refresh_card(folder, terminal)
    return report


def check_sizes(context: Sequence[int], batch: Sequence[int]) -> None:
    """Check that contexts and batches are large enough.

    Raises:
        UserError: a context is too short, or a batch has no row.
    """
    if any(length < SHORTEST for length in context):
        raise UserError(f"--context {min(context)} is too short", f"Use at least {SHORTEST} tokens.")
    if not batch or min(batch) < 1:
        raise UserError("--batch must be at least 1", "Pass one or more sizes, for example --batch 1,8.")


def random_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int], seed: int
) -> Tensor:
    """Return random token ids of a shape `[B, context]`, without special tokens."""
    every = torch.arange(model.config.get_text_config().vocab_size)
    vocabulary = every[~torch.isin(every, torch.tensor(tokenizer.all_special_ids, dtype=every.dtype))]
    chosen = torch.randint(len(vocabulary), shape, generator=torch.Generator().manual_seed(seed))
    return vocabulary[chosen].to(model.device)


def render(report: dict[str, Any]) -> RenderableType:
    """Return a report of `bench` as two tables, both models side by side: their speed, and their memory."""
    names = ("teacher", "student")
    columns = [f">{what}\n{name}" for what in ("tokens/s", "cache", "peak") for name in names]
    rows = table("phase", ">batch", ">context", *columns[:2], ">student\nx teacher")
    memory = table("phase", ">batch", ">context", *columns[2:])
    found = {(r["phase"], r["batch"], r["context"], r["model"]): r for r in report["rows"]}
    cells = list(dict.fromkeys(key[:3] for key in found))
    reasons: list[str] = []
    for cell in cells:
        pair = [found[(*cell, name)] for name in names]
        speeds, caches, peaks = (
            [row[key] for row in pair] for key in ("tokens_per_s", "state_bytes", "peak_bytes")
        )
        phase, batch, context = cell
        named = phase, str(batch), f"{context:,}"
        shown = (number(speed, ",.0f" if (speed or 0) >= 100 else ",.3g") for speed in speeds)
        rows.add_row(*named, *shown, number(ratio(*speeds), ".2f"))
        sizes = ("-" if count is None else size(count) for count in (*caches, *peaks))
        memory.add_row(*named, *sizes)
        reasons += [
            f"{phase}, {context:,} tokens, batch {batch}, {row['model']}: {row['reason']}"
            for row in pair
            if row["reason"]
        ]
    on = report["machine"]
    where = f"{on['gpu'] or on['cpu']}, {on['threads']} thread of {on['cores']} cores, {report['dtype']}"
    return Group(rows, "", memory, "", *reasons, f"{where}; medians, the models timed alternately")


def rates(teacher: dict[str, Any], student: dict[str, Any]) -> str:
    """Return the speeds of a phase as one line, from its two rows in `bench.json`."""
    speeds = teacher["tokens_per_s"], student["tokens_per_s"]
    shown = (number(speed, ",.1f") for speed in speeds)
    return f"{' against '.join(shown)} tokens/s, {number(ratio(*speeds), '.2f')} x teacher"


def ratio(teacher: float | None, student: float | None) -> float | None:
    """Return the student's speed divided by the teacher's. Return None if either was not measured."""
    return None if teacher is None or student is None else student / teacher
