"""The `linearize generate` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    checksums_option,
    command_options,
    model_options,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Continue a text.")
@click.argument("artifact")
@click.argument("prompt")
@click.option(
    "--max-new", type=click.IntRange(1), default=128, show_default=True, help="Maximum number of new tokens."
)
@click.option(
    "--speculative",
    type=click.Choice(["medusa", "lookup"]),
    help="Draft tokens with the artifact's heads or n-grams of the text.",
)
@click.option(
    "--tree", metavar="NAME|FILE", help="Medusa tree: auto, chain, mc_sim_7b_63, or a JSON file of choices."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 decodes greedily."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from the most probable tokens with this total probability.",
)
@click.option("--typical", is_flag=True, help="Use typical acceptance of drafts: faster, but LOSSY.")
@trust_option
@checksums_option
@model_options
@command_options
def generate(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Continue PROMPT with ARTIFACT and print the text as it is generated."""
    from linearize_cli.speculative.generate import generate as run

    quiet_libraries()
    result = run(**arguments)
    if not result.get("lossless", True):
        terminal.note("lossy: with --typical the text does not have the model's own distribution")
    if result.get("acceptance"):
        terminal.note(f"{result['acceptance']} tokens per forward, {result['tokens_per_s']} tokens/s")
    return result
