"""The `linearize inspect` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    command_options,
    model_options,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Show which layers of a model can be converted.")
@click.argument("model")
@trust_option
@model_options
@command_options
def inspect(terminal: Terminal, model: str, seed: int, **arguments: Any) -> dict[str, Any]:
    """Show which layers of MODEL can be converted, why others cannot, and the memory that this saves."""
    from linearize_cli.conversion.inspect import inspect as run
    from linearize_cli.tables import inspection

    quiet_libraries()
    result = run(model, **arguments)
    terminal.out.print(inspection(result))
    return result
