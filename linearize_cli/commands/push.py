"""The `linearize push` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    command_options,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Publish an artifact on the Hub.")
@click.argument("artifact", default=".")
@click.argument("repo_id", required=False)
@click.option("--private/--no-private", default=None, help="Visibility of a new repository.")
@click.option("--revision", help="An existing branch to push to.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", metavar="M", help="The commit's message.")
@click.option("--token", metavar="T", help="An access token. Default: the one that you signed in with.")
@click.option("--dry-run", is_flag=True, help="Show what would be pushed. Push nothing.")
@click.option("--no-verify", "verify", flag_value=False, default=True, help="Push without checks.")
@click.option("--yes", is_flag=True, help="Push although the base model is gated or forbids copies.")
@trust_option
@command_options
def push(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Push ARTIFACT (default: this folder) to the Hub as REPO_ID (default: your name and the folder's).

    Before anything is sent, ARTIFACT is loaded in a new process without this package, and verified (verify
    --quick).
    """
    from huggingface_hub.utils import disable_progress_bars

    from linearize_cli.publish.push import push as run
    from linearize_cli.tables import pushed

    quiet_libraries()
    if terminal.quiet:
        disable_progress_bars()
    result = run(**arguments, note=terminal.note)
    terminal.out.print(pushed(result))
    return result
