"""The `linearize compare` command."""

from typing import Any

import click

from linearize_cli.commands.options import command_options
from linearize_cli.terminal import Terminal


@click.command(short_help="Show the numbers of artifacts side by side.")
@click.argument("artifacts", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE.html", help="Also write the table as a page.")
@command_options
def compare(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Show the numbers of several ARTIFACTS side by side.

    The numbers are those that `convert`, `eval`, `bench` and `verify` have written into each folder. A note says
    which of them were measured on different text.
    """
    from linearize_cli.pages.page import comparison as run
    from linearize_cli.tables import compared

    result = run(**arguments)
    terminal.out.print(compared(result))
    return result
