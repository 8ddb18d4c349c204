"""The `linearize report` command."""

from typing import Any

import click

from linearize_cli.commands.options import command_options
from linearize_cli.terminal import Terminal


@click.command(short_help="Write a page about an artifact.")
@click.argument("artifact", default=".")
@click.option("-o", "--output", metavar="FILE.html", help="The page. Default: report.html in ARTIFACT.")
@command_options
def report(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Write a page about ARTIFACT (default: this folder): one HTML file without links to others.

    It shows what `convert`, `eval`, `bench` and `verify` have measured. Run these first; the page says what is
    missing.
    """
    from linearize_cli.pages.page import report as run

    result = run(**arguments)
    terminal.out.print(f"written: {result['output']}", soft_wrap=True)
    if result["missing"]:
        terminal.note(f"not measured yet: {', '.join(result['missing'])}")
    return result
