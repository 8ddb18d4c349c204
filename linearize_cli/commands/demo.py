"""`linearize demo`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    TOKENS,
    calm_libraries,
    command_options,
    model_options,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.option("-o", "--output", metavar="DIR", default="demo-augmented", show_default=True)
@click.option("--tokens", type=TOKENS, help="Budget of recovery.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artifact.")
@model_options
@command_options
def demo(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Run the whole pipeline on the embedded teacher, in minutes on two cores."""
    from linearize_cli.conversion.demo import demo as run
    from linearize_cli.tables import demonstration

    calm_libraries()
    result = run(terminal=terminal, **arguments)
    terminal.out.print(demonstration(result))
    return result
