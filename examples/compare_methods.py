"""Converts one checkpoint with several methods at one budget and prints a Markdown table.

    python examples/compare_methods.py MODEL --data train.jsonl --eval-data valid.jsonl --out runs

A method whose artifact is in OUT already is not run again, and an interrupted one is resumed.
"""

import json
from pathlib import Path

import click

from linearize_cli import convert
from linearize_cli.console import Terminal
from linearize_cli.recipe import load_recipe, parse_count

METHODS = "augmented,lolcats,augmented:flash,window"


@click.command()
@click.argument("model")
@click.option("--methods", default=METHODS, show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", type=parse_count, default="650k", show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--size", default=32, show_default=True, help="Of the window or group, where there is one.")
@click.option("--seed", default=0, show_default=True)
def main(model, methods, data, eval_data, out, tokens, seq_len, size, seed):
    out.mkdir(parents=True, exist_ok=True)
    click.echo(
        "| method | at swap | transferred | recovered | x teacher | local only | linear only | state | s |"
    )
    click.echo("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in methods.split(","):
        folder = out / method.replace(":", "-")
        overrides = (f"attention.local.size={size}",) if load_recipe(method).attention.local else ()
        if not folder.exists():
            convert(
                model,
                folder,
                method=method,
                overrides=overrides,
                data=(data,),
                eval_data=eval_data,
                tokens=tokens,
                seq_len=seq_len,
                seed=seed,
                resume=folder.with_name(folder.name + ".partial").exists(),
                terminal=Terminal(),
            )
        click.echo(row(method, json.loads((folder / "linearize.json").read_text())))


def row(method: str, report: dict) -> str:
    perplexity, ablation = report["perplexity"], report["ablation"]
    values = [perplexity[name] for name in ("swapped", "transferred", "recovered")]
    values += [
        perplexity["recovered"] / perplexity["teacher"],
        ablation["local_only"],
        ablation["linear_only"],
    ]
    cells = ["-" if value is None else f"{value:.3f}" for value in values]
    seconds = sum(report["seconds"].values())
    return f"| `{method}` | {' | '.join(cells)} | {report['state_bytes'] / 1000:.0f} kB | {seconds:.0f} |"


if __name__ == "__main__":
    main()
