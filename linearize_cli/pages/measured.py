"""An artifact's measurements: the reports in its folder, and the numbers by which artifacts are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from linearize_cli.artifact.checksums import check_unchanged, edited_reports
from linearize_cli.artifact.load import check_artifact
from linearize_cli.artifact.record import SEALED, read_record
from linearize_cli.errors import UserError
from linearize_cli.inputs import read_object, user_path
from linearize_cli.tables import number, size

Numbers = dict[str, str]


@dataclass(frozen=True)
class Measured:
    """An artifact and its reports.

    Attributes:
        name: the folder's name.
        folder: the folder.
        record: the contents of `linearize.json`.
        reports: the contents of `eval.json`, `bench.json` and `verify.json` by command. None if a command was not run.
    """

    name: str
    folder: Path
    record: dict[str, Any]
    reports: dict[str, dict[str, Any] | None]

    def numbers(self) -> Numbers:
        """Return the numbers that artifacts are compared by, as text by label.

        Raises:
            UserError: a report is damaged.
        """
        found = part(f"{self.folder}/linearize.json", conversion, self.record)
        for command, read in (("eval", quality), ("bench", speed), ("verify", exactness)):
            report = self.reports[command]
            if report is not None:
                found |= part(f"{self.folder / command}.json", read, report)
        return found


def read_measured(artifact: str | Path) -> Measured:
    """Read the reports in an artifact's folder.

    Raises:
        UserError: the folder is no artifact, or a report cannot be read.
    """
    folder = user_path(artifact)
    check_artifact(folder)
    record = read_record(folder, whole=True)
    check_unchanged(folder, str(folder))
    if names := edited_reports(folder):
        commands = " and ".join(f"`linearize {name.removesuffix('.json')} {folder}`" for name in names)
        raise UserError(
            f"{folder}: {', '.join(names)} cannot be read, or was changed since it was written",
            f"Run {commands} again, or remove the file.",
        )
    files = [folder / name for name in SEALED]
    reports = {file.stem: read_object(file) if file.is_file() else None for file in files}
    return Measured(folder.resolve().name, folder, record, reports)


@contextmanager
def damaged(file: str) -> Iterator[None]:
    """Raise a UserError if a report turns out to be damaged while the context is open.

    Args:
        file: the report's file, for the error.
    """
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        UndefinedError,
    ) as error:
        raise UserError(
            f"{file} is damaged: {type(error).__name__}, {error}",
            "Run the command that writes it again, or download the artifact again.",
        ) from None


def part(file: str, read: Callable[[dict[str, Any]], Any], report: dict[str, Any]) -> Any:
    """Return `read(report)`.

    Args:
        file: the report's file, for the error.

    Raises:
        UserError: the report lacks something that `read` needs, or has it in another form.
    """
    with damaged(file):
        return read(report)


def conversion(record: dict[str, Any]) -> Numbers:
    """Return the numbers of `linearize.json`."""
    linear, softmax = (len(record["layers"][kind]) for kind in ("linear", "softmax"))
    perplexity, tokens = record["perplexity"] or {}, record["tokens"] or {}
    teacher = perplexity.get("teacher")
    stages = (perplexity.get(stage) for stage in ("recovered", "transferred", "swapped"))
    student = next((value for value in stages if value is not None), None)
    found = {
        "method": record["method"],
        "base model": base_name(record["base_model"]),
        "linear layers": f"{linear} of {linear + softmax}",
        "training tokens": f"{sum(value or 0 for value in tokens.values()):,}",
        "perplexity, teacher": number(teacher),
        "perplexity": number(student),
        "perplexity, x teacher": number(student and teacher and student / teacher, ".4f"),
    }
    if record["kv_bytes_per_token"]:
        found["state"] = size(record["state_bytes"] or 0)
        found["KV cache replaced, per token"] = size(record["kv_bytes_per_token"])
    return found


def base_name(model: str) -> str:
    """Return the name of a base model: a Hub id as it is, and the folder's name of a path."""
    return Path(model).name if Path(model).is_absolute() or model.startswith((".", "~")) else model


def quality(report: dict[str, Any]) -> Numbers:
    """Return the numbers of `eval.json`."""
    perplexity, length = report["perplexity"] or {}, report["contexts"]["measured"][0]
    measured = perplexity.get("by_context") or report["embeddings"] or [{}]
    found = {"eval: text": f"{report['data']}, {measured[0].get('blocks', 0):,} blocks of {length:,}"}
    if perplexity.get("student"):
        found["eval: x teacher"] = number(perplexity["student"] / perplexity["teacher"], ".4f")
    if report["kl"] is not None:
        found["eval: KL, nats"] = number(report["kl"], ".4f")
        found["eval: same top token"] = number(report["top1_agreement"], ".1%")
    for row in report["embeddings"] or []:
        found[f"eval: distance of embeddings at {row['context']:,}"] = number(row["distance"], ".4f")
    for key, label in (("recall", "recall"), ("passkey", "pass key")):
        for row in (report[key] or {}).get("by_distance", []):
            student, teacher = (number(row[name], ".0%") for name in ("student", "teacher"))
            until = f" to {row['until'] - 1:,}" if "until" in row else ""
            found[f"eval: {label} at {row['distance']:,}{until} (teacher)"] = f"{student} ({teacher})"
    return found


def speed(report: dict[str, Any]) -> Numbers:
    """Return the numbers of `bench.json`: speeds as a ratio to the teacher's, because machines differ."""
    return {
        f"bench: {row['phase']} at {row['context']:,}, x teacher": number(row["ratio"], ".2f")
        for row in speeds(report)
        if row["batch"] == 1
    }


def speeds(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `bench.json`, both models side by side.

    Returns:
        A dict for each phase, batch size and context: `phase`, `batch`, `context`, `teacher` and `student` (their
            rows, which have `tokens_per_s`, `state_bytes` and `peak_bytes`) and `ratio` (the student's tokens/s
            divided by the teacher's, or None).
    """
    pairs: dict[tuple, dict[str, dict]] = {}
    for row in report["rows"]:
        pairs.setdefault((row["phase"], row["batch"], row["context"]), {})[row["model"]] = row
    found = []
    for (phase, batch, context), pair in pairs.items():
        rates = [pair.get(name, {}).get("tokens_per_s") for name in ("teacher", "student")]
        ratio = rates[1] / rates[0] if all(rates) else None
        found.append({"phase": phase, "batch": batch, "context": context, "ratio": ratio, **pair})
    return found


def exactness(report: dict[str, Any]) -> Numbers:
    """Return the verdict of `verify.json`."""
    return {"verify": f"{report['verdict']} ({report['dtype']})"}
