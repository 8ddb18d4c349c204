"""The `linearize demo` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    TOKENS,
    command_options,
    model_options,
    quiet_libraries,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Run everything on a small model, in minutes.")
@click.option(
    "-o", "--output", metavar="DIR", default="demo-augmented", show_default=True, help="The output folder."
)
@click.option("--tokens", type=TOKENS, help="Training tokens. Default: 600k.")
@click.option("--resume", is_flag=True, help="Continue an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@model_options
@command_options
def demo(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Run the whole pipeline on the embedded teacher, in minutes on two cores."""
    from linearize_cli.conversion.demo import demo as run
    from linearize_cli.tables import demonstration

    quiet_libraries()
    result = run(terminal=terminal, **arguments)
    terminal.out.print(demonstration(result))
    return result
