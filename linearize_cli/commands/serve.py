"""The `linearize serve` command."""

from functools import partial
from typing import Any

import click

from linearize_cli.commands.options import (
    checksums_option,
    command_options,
    device_option,
    dtype_option,
    quiet_libraries,
    trust_option,
)
from linearize_cli.errors import UserError
from linearize_cli.terminal import Terminal


@click.command(short_help="Serve an artifact behind OpenAI's API.")
@click.argument("artifact", default=".")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port. 0 takes a free one."
)
@trust_option
@checksums_option
@device_option
@dtype_option
@command_options
def serve(terminal: Terminal, **arguments: Any) -> None:
    """Serve ARTIFACT (default: this folder) behind OpenAI's API, until Ctrl-C.

    Chat and text completions, streamed or not, at http://HOST:PORT/v1. It runs on transformers' own server, which
    answers one request after the other. There is no authentication: keep the address private.
    """
    quiet_libraries()
    try:
        from linearize_cli.serving.server import serve as run
    except ImportError as error:
        raise UserError(
            f"serve needs packages that cannot be imported: {error}",
            "Install them: pip install 'transformers[serving]'",
        ) from None
    run(
        **arguments, quiet=terminal.quiet, say=partial(terminal.out.print, soft_wrap=True), note=terminal.note
    )
