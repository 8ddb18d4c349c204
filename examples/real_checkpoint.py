"""Conversions of a real checkpoint with one budget, as a Markdown table.

    python examples/real_checkpoint.py MODEL --text wikitext2-valid.txt --out runs

The first 90% of the text is for training, the last 10% for measuring. Each row is a conversion in a process of its own,
followed by `eval`: recall and pass key by distance. A row whose JSON file is in OUT is not run again. An interrupted
conversion is resumed. A row of 135M parameters and 200k tokens takes about an hour on one core.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import click

from linearize_cli import evaluate
from linearize_cli.commands.options import quiet_libraries
from linearize_cli.files import write_json
from linearize_cli.tables import size
from linearize_cli.terminal import Terminal

LENGTH, WINDOW = 512, 64
DISTANCE = 4 * WINDOW  # tokens, the distance of the table's pass keys
LOLCATS = ["--method", "lolcats", "--set", "recover.transfer.lr=4e-2"]
SEED_RECIPE = ["recover.transfer.share=0", "recover.distill.kl=0", "recover.distill.ce=1"]
ROWS = {
    "augmented": [],
    "augmented, auto:6": ["--keep-softmax", "auto:6"],
    "augmented, auto:3": ["--keep-softmax", "auto:3"],
    "window": ["--method", "window"],
    "lolcats, 1e-3": [*LOLCATS, "--set", "recover.distill.lr=1e-3"],
    "lolcats, 5e-4": [*LOLCATS, "--set", "recover.distill.lr=5e-4"],
    "lolcats, 2e-4": [*LOLCATS, "--set", "recover.distill.lr=2e-4"],
    "gated-delta": ["--method", "gated-delta"],
    "gated-delta, not calibrated": ["--method", "gated-delta", "--set", "recover.transfer.calibrate=false"],
    "seed": ["--method", "augmented:flash", *(part for key in SEED_RECIPE for part in ("--set", key))],
}
COLUMNS = (
    "at swap",
    "transferred",
    "recovered",
    "x teacher",
    "2nd half",
    "KL",
    "same token",
    "local only",
    "linear only",
    "pass key",
    "state",
    "s",
)


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True, help="A text file.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for artifacts and results."
)
@click.option("--tokens", default="200k", show_default=True, help="Training tokens of a row.")
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="A row to run. Default: all.")
@click.option(
    "--table", "only_table", is_flag=True, help="Print the table of the rows that are done, and run none."
)
def main(model: str, text: Path, out: Path, tokens: str, only: tuple[str, ...], only_table: bool) -> None:
    """Convert MODEL by each row and print a table of the results."""
    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    names = only or ROWS
    for name in () if only_table else names:
        run(name, model, *split(text, out), out, tokens)
    click.echo(table({name: result for name in ROWS if (result := done(name, out))}))


def split(text: Path, out: Path) -> tuple[Path, Path]:
    """Write the first 90% of a text and its last 10% to two files in OUT, cut at a line end. Return their paths."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", len(content) * 9 // 10) + 1
    train, evaluation = out / "train.txt", out / "eval.txt"
    train.write_text(content[:cut], encoding="utf-8")
    evaluation.write_text(content[cut:], encoding="utf-8")
    return train, evaluation


def run(name: str, model: str, train: Path, evaluation: Path, out: Path, tokens: str) -> None:
    """Convert and measure one row, and write its results to OUT/NAME.json. Do nothing if they are there."""
    record, folder = out / f"{slug(name)}.json", out / slug(name)
    if record.exists():
        return
    if not folder.exists():
        command = [sys.executable, "-m", "linearize_cli", "convert", model, "-o", str(folder)]
        command += ["--data", str(train), "--eval-data", str(evaluation), "--tokens", tokens]
        command += ["--seq-len", str(LENGTH), "--dtype", "float32", *ROWS[name]]
        resumed = ["--resume"] if folder.with_name(folder.name + ".partial").exists() else []
        click.echo(f"{name}: {' '.join(command[2:])}", err=True)
        if code := subprocess.run([*command, *resumed]).returncode:
            raise click.ClickException(f"{name}: convert ended with exit code {code} (see its error above)")
    measured = evaluate(
        folder, teacher=model, data=str(evaluation), context=(LENGTH,), dtype="float32", terminal=Terminal()
    )
    report = json.loads((folder / "linearize.json").read_text())
    write_json(record, {"options": ROWS[name], "convert": report, "eval": measured})


def slug(name: str) -> str:
    """Return the name of a row as a file name."""
    return name.replace(", ", "-").replace(":", "-")


def done(name: str, out: Path) -> dict | None:
    """Return the results of a row, or None if it is not done."""
    record = out / f"{slug(name)}.json"
    return json.loads(record.read_text()) if record.exists() else None


def table(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table, with the teacher's numbers in the first row."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    for name, result in results.items():
        report = result["convert"]
        quality, ablation = report["perplexity"], report["ablation"]
        if len(lines) == 2:
            recall = recalled(result, "teacher")
            lines.append(
                f"| the teacher | - | - | {quality['teacher']:.3f} | 1.000 | 1.000 | - | - | - | - | {recall} | - | - |"
            )
        cells = [
            *(number(quality[key]) for key in ("swapped", "transferred", "recovered")),
            number(quality["recovered"] / quality["teacher"], ".4f"),
            number(second_half(result), ".3f"),
            number(result["eval"]["kl"], ".4f"),
            number(result["eval"]["top1_agreement"], ".1%"),
            *(number(ablation[key]) for key in ("local_only", "linear_only")),
            recalled(result, "student"),
            size(report["state_bytes"]),
            f"{sum(report['seconds'].values()):,.0f}",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def second_half(result: dict) -> float:
    """Return the perplexity divided by the teacher's, over the second half of the blocks. There the text before a
    token, which a converted model sees less of, counts most.
    """
    rows = [
        row for row in result["eval"]["perplexity"]["by_position"] if LENGTH // 2 <= row["start"] < LENGTH
    ]
    return math.exp(sum(math.log(row["student"] / row["teacher"]) for row in rows) / len(rows))


def recalled(result: dict, name: str) -> str:
    """Return the share of pass keys that a model recalls at the table's distance, as text."""
    rows = result["eval"]["passkey"]["by_distance"]
    return next((f"{row[name]:.0%}" for row in rows if row["distance"] == DISTANCE), "-")


def number(value: float | None, form: str = ".3f") -> str:
    """Return a formatted number, or `-` for None."""
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
