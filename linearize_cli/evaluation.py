"""`eval`: an artifact beside its softmax teacher."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import check_artifact, load, refuse_linearized
from linearize_cli.checkpoint import load_teacher
from linearize_cli.console import Terminal, write_json
from linearize_cli.demo import heldout_path
from linearize_cli.errors import UserError
from linearize_cli.measure import plots
from linearize_cli.measure.beside import (
    Pair,
    measure_generation,
    measure_recall,
    measure_tasks,
    measure_text,
    window,
)
from linearize_cli.measure.harness import Harness
from linearize_cli.recover import data as text
from linearize_cli.tasks import CausalLM, context_length, last_position, task_of
from linearize_cli.versions import versions

SCHEMA = 1
TIMES = 8  # the trained length: the longest context, if none is asked for
SHORTEST = 8  # tokens of a block


def evaluate(
    artifact: str | Path = ".",
    *,
    teacher: str | None = None,
    data: str | None = None,
    context: Sequence[int] = (),
    tasks: Sequence[str] = (),
    tokens: int | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    terminal: Terminal | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """`linearize eval`: measure an artifact beside its softmax teacher, and write `eval.json` and figures into it.

    Args:
        teacher: the model it was made from; None: the one that its linearize.json names.
        data: text to measure on, as of `convert`; None: the demo's, of a demo artifact.
        context: tokens of a block; the first is that of the overall numbers, the longest that of those by
            position. Empty: the length it was trained at, and up to 8 times that, as far as the model's
            positions and the text allow.
        tasks: of lm_eval, by name, or as YAML files.
        tokens: of text at most; None: all (of a stream, 500,000).
        trust_remote_code: whether code that either model brings along may run.
        write: whether to write into the artifact.

    Returns:
        The contents of `eval.json`; what does not apply to this kind of model, or was not asked for, is None.

    Raises:
        UserError: anything the caller can mend. Nothing half-written is left.
    """
    terminal, folder = terminal or Terminal(quiet=True), Path(artifact).expanduser()
    check_artifact(folder)
    record = read_record(folder)
    base = teacher or record.get("base_model")
    if base is None:
        raise UserError(
            f"{folder} has no linearize.json that names its teacher", "Pass --teacher with its base model."
        )
    if any(length < SHORTEST for length in context):
        raise UserError(f"--context {min(context)} is too short", f"Use at least {SHORTEST} tokens.")
    demo = text.DEMO in (base, record.get("base_model"))
    source = open_text(data, demo)
    harness = Harness(tasks) if tasks else None
    student, tokenizer = load(
        folder.resolve(), device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    original = original_model(folder, base, student, tokenizer, dtype, device, trust_remote_code)
    task = task_of(student, tokenizer)
    if harness and not isinstance(task, CausalLM):
        raise UserError(f"--tasks: {task.kind} is no causal language model", "Leave the option out.")
    limit = text.HELD_OUT_LIMIT if tokens is None and source.count is None else tokens
    ids = torch.tensor(list(islice(chain.from_iterable(text.tokens(source, tokenizer)), limit)))
    pair = Pair(original, student, tokenizer, task, ids, terminal, seed)
    trained = record.get("seq_len") or min(1024, context_length(student))
    contexts = choose_contexts(pair, list(dict.fromkeys(context)), trained, source.name)
    reach = context_length(original) if isinstance(task, CausalLM) else max(contexts)
    if max(contexts) > reach:
        terminal.note(
            f"beyond {reach} tokens the teacher itself is outside its context: no fair reference there"
        )
    report = {
        "schema": SCHEMA,
        "teacher": base,
        "method": record.get("method"),
        "data": source.name,
        "contexts": {"trained": trained, "teacher": reach, "measured": contexts},
        "window": window(student),
        **measure_text(pair, contexts),
        **measure_recall(pair, max(contexts), demo),
        "generation": measure_generation(pair, contexts[0]) if task.decodes else None,
        "tasks": measure_tasks(pair, harness) if harness else None,
        "dtype": str(student.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
    }
    if write:
        draw(folder, report)
        write_json(folder / "eval.json", report)
    return report


def read_record(folder: Path) -> dict[str, Any]:
    """`linearize.json`, or nothing where there is none."""
    path = folder / "linearize.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "Convert again, or remove the file.") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is no report of a conversion", "Convert again, or remove the file.")
    return record


def open_text(data: str | None, demo: bool) -> text.Source:
    """The text to measure on; a local one by its name alone, for a report may be published."""
    if data is None and demo:
        return replace(text.open_source(str(heldout_path())), name="held-out text of the demo")
    if data is None:
        raise UserError(
            "eval needs text that neither model was trained on",
            "Pass --data: a text, JSONL or parquet file, a folder of them, or a Hub dataset.",
        )
    if data == text.SELF:
        raise UserError(
            "--data self: a teacher is no reference on its own writing", "Pass text that it did not write."
        )
    source = text.open_source(data)
    local = Path(data).expanduser()
    return replace(source, name=local.resolve().name) if local.exists() else source


def original_model(
    folder: Path,
    base: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str | None,
    device: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The teacher.

    Raises:
        UserError: it cannot be had, or is another kind of model than the student, or has another vocabulary.
    """
    try:
        refuse_linearized(base)
        teacher, own = load_teacher(base, dtype, device, trust_remote_code)
    except UserError as error:
        hint = "Pass --teacher with the softmax model that the artifact was made from: a folder or a Hub id."
        raise UserError(f"no teacher for {folder}: {error.what}", f"{error.hint}\n{hint}") from error
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    classes = [type(task_of(model, tokenizer)) for model in (teacher, student)]
    hint = "Pass --teacher with the model that the artifact was made from."
    if classes[0] is not classes[1]:
        raise UserError(f"{base} ({type(teacher).__name__}) is another kind of model than {folder}", hint)
    if own.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        raise UserError(f"{base} has another vocabulary ({sizes[0]:,}) than {folder} ({sizes[1]:,})", hint)
    if teacher.config.num_labels != student.config.num_labels:
        raise UserError(f"{base} has other classes than {folder}", hint)
    return teacher


def choose_contexts(pair: Pair, asked: list[int], trained: int, name: str) -> list[int]:
    """Tokens of a block, the one of the overall numbers first.

    Raises:
        UserError: blocks longer than the text, or than learned positions.
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
                f"the text ({name}) has {have:,} tokens, less than one block of {length:,}",
                "Pass more text with --data, or a smaller --context.",
            )
    if asked or not isinstance(pair.task, CausalLM):
        return asked or [trained]
    longest = min(TIMES * trained, limit or TIMES * trained, have) // trained * trained
    return list(dict.fromkeys([trained, longest]))


def draw(folder: Path, report: dict[str, Any]) -> None:
    figures = {
        "perplexity": plots.by_position(report),
        "recall": plots.by_distance(report),
        "transfer": plots.transfer(folder / "log.jsonl"),
    }
    for name, figure in figures.items():
        if figure is not None:
            plots.save(figure, folder / f"eval-{name}.png")
