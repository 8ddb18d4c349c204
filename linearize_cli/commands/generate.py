"""`linearize generate`."""

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
@click.argument("artifact")
@click.argument("prompt")
@click.option("--max-new", type=click.IntRange(1), default=128, show_default=True, help="Tokens at most.")
@click.option(
    "--speculative",
    type=click.Choice(["medusa", "lookup"]),
    help="Draft tokens, by the artifact's heads or by n-grams of the text, and verify them.",
)
@click.option(
    "--tree", metavar="NAME|FILE", help="Of medusa: auto, chain, mc_sim_7b_63, or a JSON file of choices."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from this mass of tokens.",
)
@click.option(
    "--typical", is_flag=True, help="Accept typical drafts, too: faster, but LOSSY, not the model's own text."
)
@trust_option
@model_options
@command_options
def generate(terminal: Terminal, **arguments: Any) -> dict[str, Any]:
    """Continue PROMPT with ARTIFACT, as the text comes."""
    from linearize_cli.speculative.generate import generate as run

    calm_libraries()
    result = run(**arguments)
    if not result.get("lossless", True):
        terminal.note("lossy: with --typical the text is not distributed as the model's own")
    if result.get("acceptance"):
        terminal.note(f"{result['acceptance']} tokens a forward, {result['tokens_per_s']} tokens/s")
    return result
