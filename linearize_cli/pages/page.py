"""`report`: one page about an artifact, and the page of `compare`. Each is a single HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from linearize_cli.artifact.record import DISTANCES
from linearize_cli.errors import UserError
from linearize_cli.files import cannot_write, check_writable, write_text
from linearize_cli.inputs import user_path
from linearize_cli.metrics import plots
from linearize_cli.pages import figures
from linearize_cli.pages.compare import compare
from linearize_cli.pages.measured import Measured, damaged, part, read_measured, speeds
from linearize_cli.tables import WEAK_RECALL, number, size

# The numbers at the top of the page.
HEADLINES = (
    "eval: x teacher",
    "eval: KL, nats",
    "eval: same top token",
    "state",
    "linear layers",
    "training tokens",
)
STAGES = {
    "teacher": "teacher (softmax)",
    "swapped": "linear, before training",
    "transferred": "after transfer",
    "recovered": "after distillation",
    "local_only": "local part only",
    "linear_only": "linear part only",
}


def report(artifact: str | Path = ".", output: str | Path | None = None) -> dict[str, Any]:
    """Write a page about an artifact: its numbers, figures, texts and the verdict of `verify`.

    Args:
        artifact: the artifact's folder.
        output: the HTML file. None writes `report.html` in the artifact's folder.

    Returns:
        `output`, the file that was written, and `missing`, the commands whose reports the folder lacks.

    Raises:
        UserError: the folder is no artifact, a report is damaged, or the file cannot be written.
    """
    found = read_measured(artifact)
    file = found.folder / "report.html" if output is None else html_file(output)
    check_writable(file, "" if output is None else "-o")
    with damaged(f"a report in {found.folder}"):
        text = render("report.html", contents(found))
    write_page(file, text)
    return {"output": str(file), "missing": [name for name, made in found.reports.items() if made is None]}


def comparison(artifacts: Sequence[str | Path], output: str | Path | None = None) -> dict[str, Any]:
    """Compare artifacts (see `compare`), and write a page with the result if `output` names a file.

    Raises:
        UserError: as `compare`, or the file cannot be written.
    """
    file = None if output is None else html_file(output)
    if file:
        check_writable(file, "-o")
    result = compare(artifacts)
    if file:
        write_page(file, render("compare.html", result))
    return result


def html_file(output: str | Path) -> Path:
    """Return the path of a page.

    Raises:
        UserError: it is no HTML file, so that a page never replaces a file of another kind.
    """
    file = user_path(output)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {file} is not an HTML file", "Pass a name that ends in .html.")
    return file


def write_page(file: Path, text: str) -> None:
    """Write a page atomically.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(file, text)
    except OSError as error:
        raise cannot_write(file, error) from error


def render(template: str, values: dict[str, Any]) -> str:
    """Return a page of this folder's template. All text in `values` is escaped."""
    loader = PackageLoader("linearize_cli.pages", "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template(template).render(values)


def contents(found: Measured) -> dict[str, Any]:
    """Return the values of the page's template.

    Raises:
        UserError: a report is damaged.
    """
    numbers, record = found.numbers(), found.record
    values = {
        "name": found.name,
        "quoted": shlex.quote(str(found.folder)),
        "base": Path(record["base_model"]).name,
        "method": record["method"],
        "headlines": {label: numbers[label] for label in HEADLINES if numbers.get(label, "-") != "-"},
        "command": record.get("command"),
        "versions": record["versions"] or {},
        "layers": record["layers"],
    }
    with damaged(f"{found.folder}/linearize.json"):
        values["conversion"] = conversion(found)
    for command, read in (("eval", quality), ("bench", speed), ("verify", exactness)):
        made = found.reports[command]
        values[command] = None if made is None else part(f"{found.folder / command}.json", read, made)
    return values


def conversion(found: Measured) -> dict[str, Any]:
    """Return the page's values from `linearize.json`: the quality after each stage, figures of memory and transfer, and
    the table of `--keep-softmax auto:N`.
    """
    record = found.record
    metric = next((name for name in DISTANCES if record.get(name)), None)
    stages = record[metric] if metric else {**(record["perplexity"] or {}), **(record["ablation"] or {})}
    teacher = None if metric else stages.get("teacher")
    rows = [
        (label, number(stages[key], ",.4g" if metric else ",.3f"), number(teacher and stages[key] / teacher))
        for key, label in STAGES.items()
        if stages.get(key) is not None
    ]
    kept = record["keep_softmax"]
    return {
        "measure": DISTANCES[metric] if metric else "perplexity",
        "stages": rows,
        "memory": figures.svg("memory by context", partial(figures.memory, record)),
        "transfer": figures.svg("transfer by layer", partial(plots.transfer, found.folder / "log.jsonl")),
        "kept": kept and {name: values for name, values in kept.items() if name != "kept"},
        "kept_layers": kept and kept["kept"],
    }


def quality(report: dict[str, Any]) -> dict[str, Any]:
    """Return the page's values from a report of `eval`: figures by position and by distance, texts of both models,
    embeddings, and lm_eval's tasks.
    """
    has_text = report["perplexity"] is not None
    weak = [
        label
        for key, label in (("recall", "recall"), ("passkey", "pass key"))
        if report[key] and (report[key]["teacher"] or 0) < WEAK_RECALL
    ]
    return {
        "text": report["data"],
        "contexts": " and ".join(f"{length:,}" for length in report["contexts"]["measured"]),
        "dtype": report["dtype"],
        "positions": figures.svg("perplexity by position", partial(plots.by_position, report))
        if has_text
        else None,
        "recall": figures.svg("recall by distance", partial(plots.by_distance, report)),
        "weak": weak,
        "embeddings": report["embeddings"] or [],
        "samples": [compared_texts(one) for one in (report["generation"] or {}).get("samples", [])],
        "tasks": [
            (task, metric, *(number(pair[name], ".4f") for name in ("teacher", "student")))
            for task, metrics in (report["tasks"] or {}).items()
            for metric, pair in metrics.items()
            if "stderr" not in metric
        ],
    }


def compared_texts(sample: dict[str, str]) -> dict[str, str]:
    """Return the texts of both models after one prompt: the part that they `share`, then the rest of each."""
    shared = commonprefix([sample["teacher"], sample["student"]])
    if shared not in (sample["teacher"], sample["student"]):
        shared = shared[: shared.rfind(" ") + 1]  # the first word that differs, from its start
    rest = {name: sample[name][len(shared) :] for name in ("teacher", "student")}
    return {"prompt": sample["prompt"], "shared": shared, **rest}


def speed(report: dict[str, Any]) -> dict[str, Any]:
    """Return the page's values from a report of `bench`: a figure for each phase, and a table of all rows."""
    on, rows = report["machine"], speeds(report)
    phases = dict.fromkeys(row["phase"] for row in rows)
    cells = [
        (
            row["phase"],
            f"{row['batch']:,}",
            f"{row['context']:,}",
            *(number(row.get(name, {}).get("tokens_per_s"), ",.0f") for name in ("teacher", "student")),
            number(row["ratio"], ".2f"),
            *(bytes_of(row.get(name, {}).get("peak_bytes")) for name in ("teacher", "student")),
        )
        for row in rows
    ]
    return {
        "rows": cells,
        "machine": f"{on['gpu'] or on['cpu']}, {on['threads']} thread of {on['cores']} cores, {report['dtype']}",
        "figures": [
            drawn
            for phase in phases
            if (drawn := figures.svg(f"speed of {phase}", partial(figures.speed, report, phase)))
        ],
    }


def bytes_of(count: int | None) -> str:
    """Return a number of bytes as text, or `-` for None."""
    return "-" if count is None else size(count)


def exactness(report: dict[str, Any]) -> dict[str, Any]:
    """Return the page's values from a report of `verify`: the verdict and its checks."""
    return {
        "verdict": report["verdict"],
        "dtype": report["dtype"],
        "checks": [{**line, "name": line["name"].replace("_", " ")} for line in report["checks"]],
    }
