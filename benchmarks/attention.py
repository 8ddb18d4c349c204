"""Benchmark of one attention layer: linearize, softmax and, if it is installed, flash-linear-attention.

    python benchmarks/attention.py --context 1k,4k,16k --heads 16 --head-dim 128

Every repeat runs all forms of attention in turn, so that changes of the machine's speed affect all of them alike. Times
are medians over the repeats. Next to each is the form's lower bound (roofline, see `floors`): its bytes and FLOPs at
the bandwidth and peak that a large copy and a large matrix product reach in the same run. The results are written as
JSON, a Markdown table and a plot, named after the machine.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch
from floors import BOTH, DECODE, FORWARD, Rates, Sizes, measure_rates
from forms import METHODS, SDPA, STEPS, Form, forms
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from linearize_cli.commands.options import TokenCounts
from linearize_cli.errors import UserError
from linearize_cli.files import write_json
from linearize_cli.hub import brief
from linearize_cli.metrics import plots
from linearize_cli.metrics.timing import Run, interleaved, machine, peak_bytes
from linearize_cli.models.load import check_device
from linearize_cli.tables import number, size
from linearize_cli.versions import versions

SCHEMA = 1
PHASES = (FORWARD, BOTH, DECODE)
REPEATS = 31  # the most repeats
DTYPES = ("float32", "bfloat16", "float16")


class Ready(NamedTuple):
    """A function that runs one form of attention after its warm-up, and its peak memory in bytes (None if not
    reported).
    """

    run: Run
    peak: int | None


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--context",
    type=TokenCounts(),
    default="1k,4k,16k",
    show_default=True,
    metavar="N,N",
    help="Lengths of a row in tokens.",
)
@click.option(
    "--phase",
    type=click.Choice(PHASES),
    multiple=True,
    default=PHASES,
    help="Phase to measure. Default: all.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows in the batch.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Number of heads.")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True, help="Size of a head.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16 on a GPU, else float32.")
@click.option("--device", help="torch device. Default: cuda if there is one, else cpu.")
@click.option(
    "--threads", type=click.IntRange(1, os.cpu_count()), default=1, show_default=True, help="CPU threads."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Time for all repeats of one measurement.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the inputs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the results. Default: benchmarks/results.",
)
def main(
    device: str | None, dtype: str | None, threads: int, seconds: float, out: Path, **asked: Any
) -> None:
    """Measure all forms of attention and write the results."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    try:
        check_device(device)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--out {out}: {error.strerror}") from None
    torch.set_num_threads(threads)
    on, number_type = torch.device(device), getattr(torch, dtype)
    rates = measure_rates(on, number_type)
    sizes = [
        Sizes(asked["batch"], asked["heads"], tokens, asked["head_dim"], number_type)
        for tokens in asked["context"]
    ]
    rows = []
    for phase in dict.fromkeys(asked["phase"]):
        for together in [sizes] if phase == DECODE else [[x] for x in sizes]:
            rows += measure(together, phase, rates, on, seconds, asked["seed"])
    report = {
        "schema": SCHEMA,
        "machine": machine(on) | {"bytes_per_s": rates.bandwidth, "flops_per_s": rates.peak},
        "versions": versions("triton", "flash-linear-attention") | {"cuda": torch.version.cuda},
        "command": command(
            asked | {"dtype": dtype, "device": device, "threads": threads, "seconds": seconds}
        ),
        "rows": rows,
    }
    phases = "" if asked["phase"] == PHASES else " ".join(asked["phase"])
    name = f"attention {phases} {report['machine']['gpu'] or report['machine']['cpu']}"
    name = re.sub(r"\W+", "-", name.lower())
    text = markdown(report)
    (out / f"{name}.md").write_text(text)
    plots.save(draw(rows), out / f"{name}.png")
    write_json(out / f"{name}.json", report)
    click.echo(text)
    failed = {row["form"] for row in rows if row["reason"] and row["form"] in METHODS}
    if failed:
        raise click.ClickException(f"these methods of linearize failed: {', '.join(sorted(failed))}")


def command(options: dict[str, Any]) -> str:
    """Return the command line that repeats this run, without its output folder."""
    said = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in options.items()
        if name != "phase"
    }
    arguments = (f"--{name.replace('_', '-')} {value}" for name, value in said.items())
    phases = () if options["phase"] == PHASES else (f"--phase '{phase}'" for phase in options["phase"])
    return " ".join(["python benchmarks/attention.py", *arguments, *phases])


def measure(
    several: Sequence[Sizes], phase: str, rates: Rates, device: torch.device, budget: float, seed: int
) -> list[dict[str, Any]]:
    """Time all forms of attention (linearize, softmax, flash-linear-attention) in one phase, at several
    sizes.

    Args:
        several: the sizes, all with the same batch, heads and dtype.
        phase: forward, forward and backward, or decode.
        rates: the device's measured bandwidth and peak FLOP/s, for the lower bound.
        budget: seconds for all repeats.

    Returns:
        A JSON row for each form and size. Where a form failed, its row has the `reason` and no time.
    """
    found, failed, ready = {}, {}, {}
    for sizes in several:
        click.echo(f"{phase}, {sizes.tokens:,} tokens", err=True)
        generator = torch.Generator().manual_seed(seed)
        shape = (sizes.batch, sizes.tokens, sizes.heads, sizes.dim)
        # The memory layout of a model's projections has tokens before heads.
        inputs = (torch.randn(shape, generator=generator).to(device, sizes.dtype) for _ in range(4))
        tensors = [x.transpose(1, 2) for x in inputs]
        for name, form in forms(sizes, device, generator).items():
            found[sizes, name] = form
            try:
                ready[sizes, name] = warm(form, phase, tensors, device)
            except Exception as error:  # other libraries raise any type on an unsupported device
                failed[sizes, name] = brief(error)
    # Runs of the same form follow one another, so that another form does not evict its data from the caches.
    order = sorted(ready, key=lambda key: key[1])
    seconds = interleaved({key: ready[key].run for key in order}, device, REPEATS, budget)
    runs = STEPS if phase == DECODE else 1
    middle = {key: median(times) / runs for key, times in seconds.items()}
    rows = []
    for (sizes, name), form in found.items():
        key, work = (sizes, name), form.work(sizes, phase)
        softmax = [took for (at, other), took in middle.items() if at == sizes and other.startswith(SDPA)]
        took, floor = middle.get(key), rates.floor(work)
        rows.append(
            {
                "form": name,
                "phase": phase,
                "context": sizes.tokens,
                "seconds": took,
                "tokens_per_s": took and sizes.batch * (1 if phase == DECODE else sizes.tokens) / took,
                "x_sdpa": min(softmax) / took if softmax and took else None,
                "floor_seconds": floor,
                "percent_of_floor": took and 100 * floor / took,
                "flops": work.flops,
                "bytes": work.bytes,
                "peak_bytes": ready[key].peak if key in ready else None,
                "repeats": len(seconds.get(key, ())),
                "reason": failed.get(key),
            }
        )
    return rows


def warm(form: Form, phase: str, tensors: list[Tensor], device: torch.device) -> Ready:
    """Prepare a form of attention for a phase (such as decode), run it once, and measure the peak memory of a
    second run.
    """

    def prepare() -> Run:
        run = form.ready(phase, *tensors)
        run()
        return run

    return Ready(*peak_bytes(prepare, lambda run: run(), device))


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    on = report["machine"]
    where = f"{on['gpu'] or on['cpu']}, {on['threads']} thread(s) of {on['cores']} cores"
    rates = f"{on['bytes_per_s'] / 1e9:,.1f} GB/s copied, {on['flops_per_s'] / 1e12:,.3g} TFLOP/s multiplied"
    columns = ("phase", "context", "form", "ms", "x SDPA", "floor, ms", "% of floor", "memory")
    lines = [
        f"{where}: {rates}. torch {report['versions']['torch']}.",
        "",
        f"`{report['command']}`",
        "",
        f"| {' | '.join(columns)} |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        values = (
            row["phase"],
            f"{row['context']:,}",
            row["form"],
            row["reason"] or number(row["seconds"] * 1e3, ",.3f"),
            number(row["x_sdpa"], ".2f"),
            number(row["floor_seconds"] * 1e3, ",.3f"),
            number(row["percent_of_floor"], ".1f"),
            "-" if row["peak_bytes"] is None else size(row["peak_bytes"]),
        )
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw a panel for each phase: milliseconds by context, with each form's lower bound as a dotted line."""
    drawing = Figure(figsize=(11, 3.6), layout="constrained")
    names, colours = list(dict.fromkeys(row["form"] for row in rows)), colormaps["tab10"]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    for axes, phase in zip(drawing.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        plots.name_axes(axes, phase, "context, tokens", "ms")
        for index, name in enumerate(names):
            own = [row for row in rows if row["form"] == name and row["phase"] == phase and row["seconds"]]
            contexts = [row["context"] for row in own]
            times, floors = ([row[key] * 1e3 for row in own] for key in ("seconds", "floor_seconds"))
            axes.plot(contexts, times, label=name, color=colours(index), marker="o", markersize=3)
            axes.plot(contexts, floors, color=colours(index), linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plots.StrMethodFormatter("{x:,.0f}"))
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=6)
    return drawing


if __name__ == "__main__":
    main()
