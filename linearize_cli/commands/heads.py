"""`linearize heads`."""

import sys
from typing import Any

import click

from linearize_cli.commands.options import (
    TOKENS,
    calm_libraries,
    command_options,
    model_options,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("artifact", default=".")
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True, metavar="K", help="How many.")
@click.option("--data", multiple=True, metavar="SRC", help="Text to train on; the conversion's if not given.")
@click.option("--eval-data", metavar="SRC", help="Text to measure on; else 1% of documents.")
@skip_option
@click.option("--tokens", type=TOKENS, help="Budget, such as 650k; that of the recovery if not given.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens per block; the conversion's if not given.")
@click.option("--batch-size", type=click.IntRange(1), help="Blocks per step; by the budget if not given.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="By the model's width if not given.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace the heads that are there.")
@trust_option
@model_options
@command_options
def heads(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Train Medusa heads for ARTIFACT (default: this folder), which stays as it is: they draft for
    `generate --speculative medusa`.
    """
    from linearize_cli.conversion.heads import heads as run
    from linearize_cli.tables import medusa

    calm_libraries()
    result = run(terminal=terminal, **arguments)
    if result is None:  # another process has it
        sys.exit(0)
    terminal.out.print(medusa(result))
    return result
