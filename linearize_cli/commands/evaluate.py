"""`linearize eval`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    TokenCounts,
    calm_libraries,
    command_options,
    model_options,
    skip_option,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command("eval")
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="Its softmax model; the one it was made from if not given.")
@click.option("--data", metavar="SRC", help="Text to measure on; a demo artifact has its own.")
@skip_option
@click.option("--context", type=TokenCounts(), metavar="N,N", help="Tokens of a block, such as 1k,8k.")
@click.option("--tasks", metavar="NAMES", help="Tasks of lm_eval (an extra: linearize-cli[eval]), by commas.")
@trust_option
@model_options
@command_options
def evaluate(
    terminal: Terminal, context: list[int] | None, tasks: str | None, **arguments: Any
) -> dict[str, Any]:
    """Measure ARTIFACT (default: this folder) beside its softmax teacher.

    Perplexity by position, KL and agreement, recall by distance, what it writes, what each part carries. The
    report goes to ARTIFACT/eval.json, too, with figures (eval-*.png) beside it.
    """
    from linearize_cli.metrics.evaluation import evaluate as run
    from linearize_cli.tables import evaluation

    calm_libraries()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    report = run(context=context or (), tasks=names, terminal=terminal, **arguments)
    terminal.out.print(evaluation(report))
    return report
