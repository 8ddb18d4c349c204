"""`linearize seal`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    calm_libraries,
    command_options,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("artifact", default=".")
@trust_option
@click.option("--device", default="cpu", show_default=True, help="Where it runs, as torch names it.")
@command_options
def seal(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Renew the checksums and the fingerprint of ARTIFACT (default: this folder) after a deliberate change.

    `verify` compares the artifact with both. With --trust-remote-code, the code that ARTIFACT carries is run.
    """
    from linearize_cli.artifact.seal import seal as run

    calm_libraries()
    result = run(**arguments)
    changed = f"; {result['changed']}" if result["changed"] else ""
    terminal.out.print(f"sealed {result['files']} files of {result['artifact']}{changed}")
    return result
