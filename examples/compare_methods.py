"""Comparison of all methods on one checkpoint with the same token budget, as a Markdown table.

    python examples/compare_methods.py MODEL --data train.jsonl --eval-data valid.jsonl --out runs
    python examples/compare_methods.py demo --out runs

A method whose artifact is already in OUT is not run again. An interrupted conversion is resumed. For `demo`, the table
also has the share of words that the model recalls from an earlier sentence.
"""

import json
from pathlib import Path

import click
import yaml

from linearize_cli import convert, load
from linearize_cli.commands.options import quiet_libraries
from linearize_cli.data.demo_corpus import HELDOUT_SEED, generate_documents
from linearize_cli.data.names import DEMO
from linearize_cli.demo import heldout_path
from linearize_cli.errors import UserError
from linearize_cli.files import write_json
from linearize_cli.methods.recipe import parse_count
from linearize_cli.methods.registry import load_recipe, method_names
from linearize_cli.metrics.recall import recall
from linearize_cli.terminal import Terminal

CONTROL = "window"
COLUMNS = [
    "method",
    "at swap",
    "transferred",
    "recovered",
    "x teacher",
    "x `window`",
    "local only",
    "linear only",
]


@click.command()
@click.argument("model")
@click.option("--methods", default=",".join(method_names()), help="Names, separated by commas. Default: all.")
@click.option("--data", help="Text to train on. The demo brings its own.")
@click.option("--eval-data", help="Text to measure on. The demo brings its own.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the artifacts.")
@click.option("--tokens", type=parse_count, default="160k", show_default=True, help="Tokens to train on.")
@click.option("--seq-len", default=256, show_default=True, help="Tokens of a training block.")
@click.option("--size", default=32, show_default=True, help="Size of the window or group, if there is one.")
@click.option("--seed", default=0, show_default=True, help="Seed of the conversions.")
def main(model, methods, data, eval_data, out, tokens, seq_len, size, seed):
    """Convert MODEL with every method and print a table of the results."""
    if model != DEMO and not (data and eval_data):
        raise click.UsageError("MODEL needs --data and --eval-data; only demo has text of its own")
    quiet_libraries()
    try:
        compare(model, methods.split(","), data, eval_data, out, tokens, seq_len, size, seed)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; run the same command again to continue") from None


def compare(model, methods, data, eval_data, out, tokens, seq_len, size, seed):
    """Convert the model with each method, and write and print the table.

    Raises:
        UserError: a method is unknown, a conversion is refused, or an artifact in OUT had another budget.
    """
    for method in methods:
        load_recipe(method)
    out.mkdir(parents=True, exist_ok=True)
    common = dict(tokens=tokens, seq_len=seq_len, seed=seed, terminal=Terminal())
    common |= dict(data=(data,) if data else (), eval_data=eval_data or str(heldout_path()))
    reports = {}
    for method in methods:
        folder = out / method.replace(":", "-")
        overrides = (f"attention.local.size={size}",) if load_recipe(method).attention.local else ()
        if not folder.exists():
            resume = folder.with_name(folder.name + ".partial").exists()
            convert(model, folder, method=method, overrides=overrides, resume=resume, **common)
        budget = yaml.safe_load((folder / "recipe.yaml").read_text())["recover"]["tokens"]
        if budget != tokens:
            raise UserError(
                f"{folder} was trained on {budget} tokens, not {tokens}",
                "Choose another --out, or remove the folder.",
            )
        reports[method] = json.loads((folder / "linearize.json").read_text())
        if model == DEMO:
            reports[method]["recall"] = recalled(folder)
        (out / "table.md").write_text(table(reports))
    click.echo((out / "table.md").read_text())


def recalled(folder: Path) -> float:
    """Return the share of repeated words that the artifact recalls. A saved result is used if there is one."""
    path = folder.with_name(folder.name + ".recall.json")
    if not path.exists():
        result = recall(*load(folder), list(generate_documents(HELDOUT_SEED, 100)))
        write_json(path, result)
    return json.loads(path.read_text())["accuracy"]


def table(reports: dict[str, dict]) -> str:
    """Return the results as a Markdown table, the best method first."""
    with_recall = any("recall" in report for report in reports.values())
    columns = [*COLUMNS, *(["recall"] if with_recall else []), "state", "s"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    control = reports.get(CONTROL, {}).get("perplexity", {}).get("recovered")
    for method, report in sorted(reports.items(), key=lambda item: item[1]["perplexity"]["recovered"]):
        perplexity, ablation = report["perplexity"], report["ablation"]
        recovered = perplexity["recovered"]
        values = [
            perplexity["swapped"],
            perplexity["transferred"],
            recovered,
            recovered / perplexity["teacher"],
        ]
        values += [control and recovered / control, ablation["local_only"], ablation["linear_only"]]
        cells = [number(value) for value in values]
        if with_recall:
            cells.append(f"{report['recall']:.1%}")
        cells += [f"{report['state_bytes'] / 1000:.0f} kB", f"{sum(report['seconds'].values()):.0f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", augmentation(reports)]) + "\n"


def augmentation(reports: dict[str, dict]) -> str:
    """Return a sentence that says for how many bases the augmented method beats the plain one."""
    final = {method: report["perplexity"]["recovered"] for method, report in reports.items()}
    bases = {name: name.partition(":")[2] or "hedgehog" for name in final if name.startswith("augmented")}
    pairs = [(name, base) for name, base in bases.items() if base in final]
    behind = [
        f"`{base}` ({final[base]:.3f} against {final[name]:.3f})"
        for name, base in pairs
        if final[name] >= final[base]
    ]
    if not pairs:
        return "No method was run both plain and augmented."
    said = f"The augmented method beats the plain one for {len(pairs) - len(behind)} of {len(pairs)} bases"
    return f"{said}, but not for {', '.join(behind)}." if behind else f"{said}."


def number(value: float | None) -> str:
    """Return a formatted number, or `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1000 else f"{value:.2g}"


if __name__ == "__main__":
    main()
