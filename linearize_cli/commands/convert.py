"""`linearize convert`."""

import sys
from typing import Any

import click

from linearize_cli.commands.options import (
    FLOPS,
    METHOD,
    TOKENS,
    calm_libraries,
    command_options,
    model_options,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("model")
@click.option("-o", "--output", metavar="DIR", help="Where to; ./MODEL-METHOD if not given.")
@click.option(
    "--method",
    type=METHOD,
    metavar="NAME",
    default="augmented",
    show_default=True,
    help="NAME[:BASE] or FILE.yaml; see `methods`.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--keep-softmax", metavar="N|auto:N|at:i,j,k", help="Layers to keep as they are; auto: by KL.")
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on; may be repeated.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on; else 1% of documents.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Budget of recovery, such as 650k; the recipe's if not given.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block; at most 1024 if not given.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Blocks per step; by the budget if not given, 8 at most."
)
@click.option("--no-train", is_flag=True, help="Swap only.")
@click.option(
    "--medusa-heads",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Then train K Medusa heads, for speculative decoding, on as many tokens again.",
)
@click.option(
    "--tracker", multiple=True, metavar="NAME", help="tensorboard, wandb or trackio; may be repeated."
)
@click.option("--keep-adapter", is_flag=True, help="Keep the unmerged LoRA under adapter/.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option(
    "--dry-run", is_flag=True, help="Show the plan, memory and time, from MODEL's config; write nothing."
)
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="Of --dry-run: how many train."
)
@click.option("--flops", type=FLOPS, help="Of --dry-run: FLOP/s of one, such as 200T; measured if not given.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@trust_option
@model_options
@command_options
def convert(terminal: Terminal, no_train: bool, tracker: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    """Convert MODEL: swap its attention, recover the quality, check and save.

    MODEL is a Hub id, a folder (Hugging Face's or Meta's Llama format), or `demo`. SRC is a text, JSONL or
    parquet file, a folder of them, a Hub dataset NAME[:CONFIG][:SPLIT], or `self` (sampled from the model).
    """
    from linearize_cli.conversion.convert import convert as run
    from linearize_cli.tables import conversion, plan

    calm_libraries()
    trackers = tuple(name for names in tracker for name in names.split(","))
    result = run(train=not no_train, tracker=trackers, terminal=terminal, **arguments)
    if result is None:  # another process has it
        sys.exit(0)
    terminal.out.print(plan(result) if arguments["dry_run"] else conversion(result))
    return result
