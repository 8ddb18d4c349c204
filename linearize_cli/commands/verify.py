"""The `linearize verify` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    command_options,
    model_options,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Check that all forms of an artifact agree.")
@click.argument("artifact", default=".")
@click.option("--prompts", metavar="FILE", help="Prompts of the greedy check: one per line, or JSONL.")
@click.option("--max-new", type=click.IntRange(1), default=64, show_default=True, help="Tokens per prompt.")
@click.option(
    "--draft",
    metavar="medusa|lookup|MODEL",
    help="The drafter. Default: medusa if ARTIFACT has heads, else lookup.",
)
@click.option(
    "--target",
    type=click.Choice(["self", "teacher"]),
    default="self",
    show_default=True,
    help="The model that verifies drafts. teacher: the softmax model.",
)
@click.option(
    "--tree", metavar="NAME|FILE", help="auto (with heads), chain, mc_sim_7b_63, or a JSON file of choices."
)
@click.option("--quick", is_flag=True, help="Skip the slow checks: long rows, many batches, other drafts.")
@trust_option
@model_options
@command_options
def verify(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Check that all forms of ARTIFACT (default: this folder) agree, including speculative decoding, and
    measure them.

    The report is also written to ARTIFACT/verify.json. With --trust-remote-code, the artifact's own code is
    run. Otherwise this package's code is run, which must be the same.
    """
    from linearize_cli.verification.report import render
    from linearize_cli.verification.verify import verify as run

    quiet_libraries()
    report = run(**arguments, progress=lambda check: terminal.note(f"checking {check}"))
    terminal.out.print(render(report))
    return report
