"""`linearize push`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    command_options,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("artifact", default=".")
@click.argument("repo_id", required=False)
@click.option("--private/--no-private", default=None, help="Visibility of a new repository.")
@click.option("--revision", help="Branch to push to; it must exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", metavar="M")
@click.option("--token", metavar="T", help="Instead of the one you signed in with.")
@click.option("--dry-run", is_flag=True, help="Show what would be pushed.")
@command_options
def push(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Push ARTIFACT (default: this folder) to the Hub as REPO_ID (default: your name and the folder's)."""
    from huggingface_hub.utils import disable_progress_bars

    from linearize_cli.artifact.push import push as run
    from linearize_cli.tables import pushed

    if terminal.quiet:
        disable_progress_bars()
    result = run(**arguments)
    terminal.out.print(pushed(result))
    return result
