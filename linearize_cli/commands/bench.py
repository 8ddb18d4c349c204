"""`linearize bench`."""

from typing import Any

import click

from linearize_cli.commands.options import (
    Counts,
    TokenCounts,
    calm_libraries,
    command_options,
    model_options,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command()
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="Its softmax model; the one it was made from if not given.")
@click.option(
    "--context",
    type=TokenCounts(),
    metavar="N,N",
    help="Tokens; up to 8 times the trained length if not given.",
)
@click.option("--batch", type=Counts(), metavar="N,N", default="1", show_default=True, help="Rows at a time.")
@click.option("--plot", metavar="FILE", help="The figure, a PNG; ARTIFACT/bench.png if not given.")
@trust_option
@model_options
@command_options
def bench(terminal: Terminal, context: list[int] | None, **arguments: Any) -> dict[str, Any]:
    """Measure the speed and memory of ARTIFACT (default: this folder) beside its softmax teacher.

    Prefill, decoding and training by context, both models in turn on one thread; medians. The report goes to
    ARTIFACT/bench.json, too, with a figure beside it.
    """
    from linearize_cli.metrics.benchmark import bench as run
    from linearize_cli.metrics.benchmark import render

    calm_libraries()
    report = run(context=context or (), terminal=terminal, **arguments)
    terminal.out.print(render(report))
    return report
