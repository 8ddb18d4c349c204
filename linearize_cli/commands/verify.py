"""`linearize verify`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    calm_libraries,
    command_options,
    model_options,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("artifact", default=".")
@click.option("--prompts", metavar="FILE", help="Prompts for the greedy check: a line each, or JSONL.")
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="Tokens per prompt.")
@click.option(
    "--draft", metavar="medusa|lookup|MODEL", help="Drafter; medusa if ARTIFACT has heads, else lookup."
)
@click.option(
    "--target",
    type=click.Choice(["self", "teacher"]),
    default="self",
    show_default=True,
    help="teacher: ARTIFACT drafts for its softmax model.",
)
@click.option("--tree", metavar="NAME|FILE", help="mc_sim_7b_63, chain, auto (with heads), or JSON choices.")
@click.option("--quick", is_flag=True, help="Leave out rows, drafts, definition, long and most of sampling.")
@trust_option
@model_options
@command_options
def verify(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Prove that all forms of ARTIFACT (default: this folder) compute the same, speculation among them, and measure it.

    The report goes to ARTIFACT/verify.json, too. With --trust-remote-code, the code that ARTIFACT carries is run; else
    this package's, which must be the same.
    """
    from linearize_cli.verification.verify import render
    from linearize_cli.verification.verify import verify as run

    calm_libraries()
    report = run(**arguments, progress=lambda check: terminal.note(f"checking {check}"))
    terminal.out.print(render(report))
    return report
