"""The `linearize heads` command."""

import sys
from typing import Any

import click

from linearize_cli.commands.options import (
    TOKENS,
    command_options,
    model_options,
    quiet_libraries,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Train Medusa heads for speculative decoding.")
@click.argument("artifact", default=".")
@click.option(
    "--heads", type=click.IntRange(1), default=4, show_default=True, metavar="K", help="Number of heads."
)
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on. Default: the conversion's.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on. Default: 1% of the documents.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Training tokens, such as 650k. Default: the conversion's.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block. Default: the conversion's.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Blocks per step. Default: 1 to 8, by the token budget."
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate. Default: by the model's width."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--force", is_flag=True, help="Replace existing heads.")
@trust_option
@model_options
@command_options
def heads(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Train Medusa heads for ARTIFACT (default: this folder), without changing its model.

    `generate --speculative medusa` drafts with them.
    """
    from linearize_cli.conversion.heads import heads as run
    from linearize_cli.tables import medusa

    quiet_libraries()
    result = run(terminal=terminal, **arguments)
    if result is None:  # the main process has the result
        sys.exit(0)
    terminal.out.print(medusa(result))
    return result
