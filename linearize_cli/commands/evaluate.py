"""The `linearize eval` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    TOKENS,
    TokenCounts,
    checksums_option,
    command_options,
    model_options,
    quiet_libraries,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command("eval", short_help="Compare quality with the teacher.")
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="The softmax model. Default: the artifact's base model.")
@click.option("--data", metavar="SRC", help="Text to measure on. A demo artifact has its own.")
@skip_option
@click.option("--tokens", type=TOKENS, help="At most this many tokens of text. Default: all.")
@click.option("--context", type=TokenCounts(), metavar="N,N", help="Tokens per block, such as 1k,8k.")
@click.option(
    "--tasks", metavar="NAMES", help="Tasks of lm_eval, separated by commas (requires the package lm_eval)."
)
@trust_option
@checksums_option
@model_options
@command_options
def evaluate(
    terminal: Terminal, context: list[int] | None, tasks: str | None, **arguments: Any
) -> dict[str, Any]:
    """Compare the quality of ARTIFACT (default: this folder) with its softmax teacher.

    It measures perplexity by position, KL and agreement with the teacher, recall by distance, and the
    contribution of each part of the attention, and shows samples of text. The report is also written to
    ARTIFACT/eval.json, with figures (eval-*.png).
    """
    from linearize_cli.metrics.evaluation import evaluate as run
    from linearize_cli.tables import evaluation

    quiet_libraries()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    report = run(context=context or (), tasks=names, terminal=terminal, **arguments)
    terminal.out.print(evaluation(report))
    return report
