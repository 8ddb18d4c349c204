"""The `linearize seal` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    command_options,
    device_option,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Renew checksums after a change of your own.")
@click.argument("artifact", default=".")
@trust_option
@device_option
@command_options
def seal(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Renew the checksums and the fingerprint of ARTIFACT (default: this folder) after a deliberate change.

    `verify` compares the artifact with both. With --trust-remote-code, the artifact's own code is run.
    """
    from linearize_cli.artifact.seal import seal as run

    quiet_libraries()
    result = run(**arguments)
    changed = f"; {result['changed']}" if result["changed"] else ""
    terminal.out.print(f"sealed {result['files']} files of {result['artifact']}{changed}")
    return result
