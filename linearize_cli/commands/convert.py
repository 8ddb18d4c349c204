"""The `linearize convert` command."""

import sys
from typing import Any

import click

from linearize_cli.commands.options import (
    FLOPS,
    MEMORY,
    METHOD,
    TOKENS,
    command_options,
    config_option,
    model_options,
    quiet_libraries,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Convert a model to linear attention.")
@click.argument("model")
@click.option("-o", "--output", metavar="DIR", help="The output folder. Default: ./MODEL-METHOD.")
@click.option(
    "--method",
    type=METHOD,
    metavar="NAME",
    default="augmented",
    show_default=True,
    help="NAME[:BASE] or FILE.yaml. See `linearize methods`.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option(
    "--keep-softmax", metavar="N|auto:N|at:i,j,k", help="Softmax layers to keep. auto:N measures which."
)
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on. May be repeated.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on. Default: 1% of the documents.")
@click.option("--eval-tokens", type=TOKENS, help="At most this many tokens to measure on. Default: 100k.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Training tokens, such as 650k. Default: the recipe's.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block. Default: at most 1024.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Blocks per step. Default: 1 to 8, by the token budget."
)
@click.option("--no-train", is_flag=True, help="Swap the attention without training.")
@click.option(
    "--medusa-heads",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Also train K Medusa heads for speculative decoding, with as many tokens.",
)
@click.option(
    "--tracker", multiple=True, metavar="NAME", help="tensorboard, wandb or trackio. May be repeated."
)
@click.option("--keep-adapter", is_flag=True, help="Also save the unmerged LoRA in DIR/adapter.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option(
    "--dry-run", is_flag=True, help="Show the plan, memory and time from MODEL's config. Write nothing."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of training processes to plan for (with --dry-run).",
)
@click.option(
    "--flops", type=FLOPS, help="FLOP/s of a process (with --dry-run), such as 200T. Default: measured."
)
@click.option(
    "--memory",
    type=MEMORY,
    default="auto",
    show_default=True,
    help="Memory to plan for, such as 24G. auto: what is free.",
)
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@config_option
@trust_option
@model_options
@command_options
def convert(terminal: Terminal, no_train: bool, tracker: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    """Convert MODEL: swap its attention, recover the quality, check and save.

    MODEL is a Hub id, a folder (Hugging Face's or Meta's Llama format), a GGUF file (FILE.gguf, or
    OWNER/NAME:FILE.gguf on the Hub), or `demo`. SRC is a text, JSONL or parquet file, a folder of them, a Hub
    dataset NAME[:CONFIG][:SPLIT], or `self` (text sampled from the model).
    """
    from linearize_cli.conversion.convert import convert as run
    from linearize_cli.tables import conversion, plan

    quiet_libraries()
    trackers = tuple(name for names in tracker for name in names.split(","))
    result = run(train=not no_train, tracker=trackers, terminal=terminal, **arguments)
    if result is None:  # the main process has the result
        sys.exit(0)
    terminal.out.print(plan(result) if arguments["dry_run"] else conversion(result))
    return result
