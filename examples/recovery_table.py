"""Comparison of conversions with different options and seeds, from the rows of a YAML file, as a Markdown table.

    python examples/recovery_table.py examples/recovery.yaml MODEL --data train.jsonl --eval-data valid.jsonl --out runs

A row is a set of options of `linearize convert`. Each conversion runs in its own process, so that its peak memory can
be measured. Results already in OUT are not run again, and an interrupted row is resumed. After each conversion, the
forward and backward of the artifact and the forward of its teacher are timed on batches of the same shape.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
import yaml

from linearize_cli import load
from linearize_cli.files import write_json
from linearize_cli.models.load import load_teacher
from linearize_cli.versions import versions

REPEATS = 12  # timed passes
SEEDS = [0, 1, 2]  # seeds of a row that names none


@click.command()
@click.argument("rows", type=click.Path(exists=True, path_type=Path))
@click.argument("model")
@click.option("--data", multiple=True, required=True, help="Text to train on.")
@click.option("--eval-data", required=True, help="Text to measure on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the artifacts.")
@click.option("--only", multiple=True, help="Name of a row to run. Default: all.")
def main(rows, model, data, eval_data, out, only):
    """Convert MODEL by each row of the YAML file ROWS and print a table of the results."""
    plan = yaml.safe_load(rows.read_text())
    out.mkdir(parents=True, exist_ok=True)
    texts = [*(x for source in data for x in ("--data", source)), "--eval-data", eval_data]
    results = {}
    for name, row in plan["rows"].items():
        if only and name not in only:
            continue
        options = {**plan["defaults"], **(row or {})}
        options.pop("against", None)
        for seed in options.pop("seeds", SEEDS):
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            results.setdefault(name, []).append(run(model, folder, options, seed, texts))
            (out / "table.md").write_text(table(plan["rows"], results))
    click.echo((out / "table.md").read_text())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    click.echo(f"{machine}; {', '.join(f'{name} {version}' for name, version in versions().items())}")


def run(model: str, folder: Path, options: dict, seed: int, texts: list[str]) -> dict:
    """Run one conversion in a process of its own, and return its report with speeds and peak memory.

    A saved report is used if there is one. The peak memory of a resumed conversion is None.
    """
    record = folder.with_name(folder.name + ".json")
    if record.exists():
        return json.loads(record.read_text())
    command = [
        sys.executable,
        "-m",
        "linearize_cli",
        "convert",
        model,
        "-o",
        str(folder),
        "--seed",
        str(seed),
    ]
    for key, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            command += [f"--{key}", str(each)]
    resumed = folder.with_name(folder.name + ".partial").exists()
    click.echo(" ".join(command[2:]), err=True)
    if not folder.exists():
        process = subprocess.Popen([*command, *texts, *(["--resume"] if resumed else [])])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            raise click.ClickException(
                f"{folder}: convert failed with exit code {code} (see its error above)"
            )
        peak = None if resumed else usage.ru_maxrss / 1000
    else:
        peak = None
    report = json.loads((folder / "linearize.json").read_text())
    report["speed"] = speeds(model, folder, int(options["seq-len"]), report) | {"peak_mb": peak}
    write_json(record, report)
    return report


def speeds(model: str, folder: Path, length: int, report: dict) -> dict[str, float]:
    """Return tokens per second: of each training stage, of the artifact's forward and backward ("plain"), and of the
    teacher's forward.
    """
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = {
        stage: statistics.median(line["tokens_per_s"] for line in lines if line["stage"] == stage)
        for stage, tokens in report["tokens"].items()
        if tokens
    }
    student, _ = load(folder)
    teacher, _ = load_teacher(model, None, "cpu", False)
    ids = torch.randint(3, student.config.vocab_size, (4, length))
    return measured | {
        "plain": tokens_per_second(student.requires_grad_(True), ids, backward=True),
        "teacher": tokens_per_second(teacher, ids, backward=False),
    }


def tokens_per_second(model, ids: torch.Tensor, backward: bool) -> float:
    """Return the median tokens per second over a few passes on ids `[B, T]`, after one untimed pass."""
    took = []
    for _ in range(REPEATS + 1):
        started = time.monotonic()
        with torch.set_grad_enabled(backward):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
            model.zero_grad()
        took.append(time.monotonic() - started)
    return ids.numel() / statistics.median(took[1:])


COLUMNS = [
    *("row", "recovered", "x teacher", "at swap", "transferred", "local only", "linear only"),
    *("transfer tok/s", "distill tok/s", "plain tok/s", "teacher tok/s", "peak", "s"),
]


def table(rows: dict[str, dict], results: dict[str, list[dict]]) -> str:
    """Return the results as a Markdown table of means over the seeds.

    The recovered perplexity also has its lowest and highest value. Below the table, rows with `against` are compared
    with another row by their gap to the teacher. *plain* is the forward and backward of the converted model with its
    language-model loss, *teacher* the forward of the teacher.
    """
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    for name, reports in results.items():
        final = [report["perplexity"]["recovered"] for report in reports]
        cells = [
            f"{statistics.mean(final):.3f} ({min(final):.3f}-{max(final):.3f})",
            f"{statistics.mean(ratios(reports)):.4f}",
            *(mean(reports, "perplexity", key) for key in ("swapped", "transferred")),
            *(mean(reports, "ablation", key) for key in ("local_only", "linear_only")),
            *(mean(reports, "speed", key, "{:,.0f}") for key in ("transfer", "distill", "plain", "teacher")),
            mean(reports, "speed", "peak_mb", "{:.0f} MB"),
            f"{statistics.mean(sum(r['seconds'].values()) for r in reports):.0f}",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    gaps = {name: statistics.mean(ratios(reports)) - 1 for name, reports in results.items()}
    for name, row in rows.items():
        other = (row or {}).get("against")
        if name in gaps and other in gaps:
            lines.append(
                f"\n`{name}` ends {gaps[name]:.2%} above the teacher's perplexity, `{other}` {gaps[other]:.2%} above."
            )
    return "\n".join(lines) + "\n"


def ratios(reports: list[dict]) -> list[float]:
    """Return the recovered perplexity of each report divided by the teacher's."""
    return [report["perplexity"]["recovered"] / report["perplexity"]["teacher"] for report in reports]


def mean(reports: list[dict], part: str, key: str, form: str = "{:.3f}") -> str:
    """Return the formatted mean of a measurement over reports, or `-` if one of them lacks it."""
    values = [report[part].get(key) for report in reports]
    return "-" if None in values else form.format(statistics.mean(values))


if __name__ == "__main__":
    main()
