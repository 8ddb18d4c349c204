"""The `linearize bench` command."""

from typing import Any

import click

from linearize_cli.commands.options import (
    Counts,
    TokenCounts,
    checksums_option,
    command_options,
    model_options,
    quiet_libraries,
    trust_option,
)
from linearize_cli.terminal import Terminal


@click.command(short_help="Compare speed and memory with the teacher.")
@click.argument("artifact", default=".")
@click.option("--teacher", metavar="MODEL", help="The softmax model. Default: the artifact's base model.")
@click.option(
    "--context",
    type=TokenCounts(),
    metavar="N,N",
    help="Context lengths. Default: up to 8 times the training length.",
)
@click.option("--batch", type=Counts(), metavar="N,N", default="1", show_default=True, help="Batch sizes.")
@click.option(
    "--phase",
    "phases",
    type=click.Choice(["prefill", "decode", "train"]),
    multiple=True,
    help="A phase to measure; repeatable. Default: all.",
)
@click.option("--plot", metavar="FILE", help="Also write the figure (bench.png) to this PNG file.")
@trust_option
@checksums_option
@model_options
@command_options
def bench(terminal: Terminal, context: list[int] | None, **arguments: Any) -> dict[str, Any]:
    """Compare the speed and memory of ARTIFACT (default: this folder) with its softmax teacher.

    It measures prefill, decoding and training by context length. The models run in turns on one thread, and
    medians are reported. The report is also written to ARTIFACT/bench.json, with a figure.
    """
    from linearize_cli.metrics.benchmark import bench as run
    from linearize_cli.metrics.benchmark import render

    quiet_libraries()
    report = run(context=context or (), terminal=terminal, **arguments)
    terminal.out.print(render(report))
    return report
