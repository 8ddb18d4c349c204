"""`eval`: the quality of an artifact, compared with its softmax teacher."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from linearize_cli.artifact.load import check_artifact, load
from linearize_cli.artifact.record import read_record, summed
from linearize_cli.artifact.save import refresh_card
from linearize_cli.artifact.teacher import original_model, teacher_name
from linearize_cli.data import sources as text
from linearize_cli.data.names import DEMO, SELF
from linearize_cli.demo import heldout_path
from linearize_cli.errors import UserError
from linearize_cli.files import check_writable, write_json
from linearize_cli.inputs import user_path
from linearize_cli.metrics import plots
from linearize_cli.metrics.harness import Harness
from linearize_cli.metrics.teacher_comparison import (
    Pair,
    measure_embeddings,
    measure_generation,
    measure_recall,
    measure_tasks,
    measure_text,
    window,
)
from linearize_cli.models.positions import context_length, last_position
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.terminal import Terminal
from linearize_cli.versions import versions

SCHEMA = 1
TIMES = 8  # the longest default context, in multiples of the trained length
SHORTEST = 8  # tokens of the shortest block allowed
FIGURES = ("eval-perplexity.png", "eval-recall.png", "eval-transfer.png")


def evaluate(
    artifact: str | Path = ".",
    *,
    teacher: str | None = None,
    data: str | None = None,
    skip_bad_rows: int = 0,
    context: Sequence[int] = (),
    tasks: Sequence[str] = (),
    tokens: int | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Compare an artifact with its softmax teacher, and write `eval.json` and figures into it.

    It is the function behind `linearize eval`.

    Args:
        artifact: the artifact's folder.
        teacher: the softmax model that the artifact was made from. None uses the one that linearize.json
            names.
        data: the text to measure on: a file, a folder or a Hub dataset. None uses the demo's held-out text,
            for a demo artifact only.
        skip_bad_rows: the number of unusable rows of the data that may be skipped.
        context: block lengths in tokens. The first is used for the overall numbers, the longest for the
            numbers by position. If empty, the trained length and up to 8 times that are used, as far as the
            model's positions and the text allow.
        tasks: tasks of lm_eval, by name or as YAML files.
        tokens: the most tokens of text to read. None reads all of it, or 500,000 of a stream.
        trust_remote_code: allow both models to run their own code.
        checksums: False to load files that differ from the artifact's checksums.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: the name of the torch dtype to run in. None uses the artifact's.
        seed: the seed of recall probes and of sampled text.
        write: write the report and the figures into the artifact.

    Returns:
        The contents of `eval.json`. Parts that do not apply to the model, or were not asked for, are None.

    Raises:
        UserError: the artifact, the teacher or the data cannot be loaded, an argument does not fit them, or a
            file cannot be written. No partly written file is left.
    """
    terminal, folder = terminal or Terminal(quiet=True), user_path(artifact)
    check_artifact(folder)
    record = read_record(folder)
    base = teacher_name(folder, record, teacher)
    if write:
        for name in ("eval.json", *FIGURES):
            check_writable(folder / name)
    if any(length < SHORTEST for length in context):
        raise UserError(f"--context {min(context)} is too short", f"Use at least {SHORTEST} tokens.")
    demo = DEMO in (base, record.get("base_model"))
    source = open_text(data, demo, text.BadRows(skip_bad_rows))
    harness = Harness(tasks) if tasks else None
    student, tokenizer = load(
        folder.resolve(),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        checksums=checksums,
    )
    original = original_model(folder, base, student, tokenizer, dtype, device, trust_remote_code)
    task = task_of(student, tokenizer)
    if harness and not isinstance(task, CausalLM):
        raise UserError(f"--tasks: {task.kind} is not a causal language model", "Leave the option out.")
    text.read_through(source, tokenizer, task)
    limit = text.HELD_OUT_LIMIT if tokens is None and source.count is None else tokens
    ids = torch.tensor(list(islice(chain.from_iterable(text.tokens(source, tokenizer)), limit)))
    task.check_tokens(ids)
    source.bad.report(terminal)
    pair = Pair(original, student, tokenizer, task, ids, terminal, seed)
    trained = record.get("seq_len") or min(1024, context_length(student))
    contexts = choose_contexts(pair, list(dict.fromkeys(context)), trained, source.name)
    reach = context_length(original) if isinstance(task, CausalLM) else max(contexts)
    if max(contexts) > reach:
        terminal.note(
            f"beyond {reach} tokens the teacher is outside its own context, so it is no fair reference there"
        )
    report = {
        "schema": SCHEMA,
        "teacher": base,
        "method": record.get("method"),
        "data": source.name,
        "contexts": {"trained": trained, "teacher": reach, "measured": contexts},
        "window": window(student),
        **(measure_embeddings if task.embeds else measure_text)(pair, contexts),
        **measure_recall(pair, max(contexts), demo),
        "generation": measure_generation(pair, contexts[0]) if task.decodes else None,
        "tasks": measure_tasks(pair, harness) if harness else None,
        "dtype": str(student.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }
    report = summed(report)
    if write:
        draw(folder, report)
        write_json(folder / "eval.json", report)
        refresh_card(folder, terminal)
    return report


def open_text(data: str | None, demo: bool, bad: text.BadRows) -> text.Source:
    """Open the text to measure on.

    A local source is named by its file name alone, because the report may be published.

    Args:
        data: the name of the text. None uses the demo's held-out text, for the demo's artifact only.
        demo: True for the demo's artifact.
        bad: counts the skipped rows.

    Raises:
        UserError: no text was given, or it is `self`, or it cannot be opened.
    """
    if data is None and demo:
        return replace(text.open_source(str(heldout_path())), name="held-out text of the demo")
    if data is None:
        raise UserError(
            "eval needs text that neither model was trained on",
            "Pass --data: a text, JSONL or parquet file, a folder of them, or a Hub dataset.",
        )
    if data == SELF:
        raise UserError(
            "--data self would measure the teacher on its own text",
            "Pass text that the teacher did not write.",
        )
    source = text.open_source(data, bad)
    local = user_path(data)
    return replace(source, name=local.resolve().name) if local.exists() else source


def choose_contexts(pair: Pair, asked: list[int], trained: int, name: str) -> list[int]:
    """Return the block lengths to measure, in tokens. The first is used for the overall numbers.

    Args:
        asked: the lengths of the command line. If empty, the trained length and up to 8 times that are used.
        trained: the block length of the conversion.
        name: the text's name in messages.

    Raises:
        UserError: a block is longer than the text, or than the teacher's learned positions.
    """
    limit, have = last_position(pair.teacher), len(pair.text)
    for length in asked or [trained]:
        if limit is not None and length > limit:
            raise UserError(
                f"--context {length} is beyond the {limit} positions that the model has learned",
                f"Use at most {limit}.",
            )
        if length > have:
            raise UserError(
                f"the text ({name}) has {have:,} tokens, fewer than one block of {length:,}",
                "Pass more text with --data, or a smaller --context.",
            )
    if asked or not isinstance(pair.task, CausalLM):
        return asked or [trained]
    longest = min(TIMES * trained, limit or TIMES * trained, have) // trained * trained
    return list(dict.fromkeys([trained, longest]))


def draw(folder: Path, report: dict[str, Any]) -> None:
    """Write the figures of a report into the artifact's folder. A figure without data is not written."""
    drawn = (plots.by_position(report), plots.by_distance(report), plots.transfer(folder / "log.jsonl"))
    for name, figure in zip(FIGURES, drawn, strict=True):
        if figure is not None:
            plots.save(figure, folder / name)
