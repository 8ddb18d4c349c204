"""One layer's attention, measured: ours, softmax and, where it is installed, flash-linear-attention.

    python benchmarks/attention.py --context 1k,4k,16k --heads 16 --head-dim 128

Every repeat runs all forms once, so that they meet the same machine, and decoding at all contexts, some steps of each.
A number is the median of the repeats. Beside it stands the least time that the form's own arithmetic and bytes allow on
this device (`floors`), at the bandwidth and the peak that a large copy and a large product of matrices reach in the
same run. Writes a JSON, a Markdown table and a plot, named after the machine.
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
from linearize_cli.metrics import plots
from linearize_cli.metrics.timing import Run, interleaved, machine, peak_bytes
from linearize_cli.models.load import check_device
from linearize_cli.models.load_errors import brief
from linearize_cli.tables import number, size
from linearize_cli.versions import versions

SCHEMA = 1
PHASES = (FORWARD, BOTH, DECODE)
REPEATS = 31  # at most
DTYPES = ("float32", "bfloat16", "float16")


class Ready(NamedTuple):
    run: Run
    peak: int | None


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--context", type=TokenCounts(), default="1k,4k,16k", show_default=True, metavar="N,N")
@click.option("--phase", type=click.Choice(PHASES), multiple=True, default=PHASES, help="All, if not given.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="bfloat16 on a GPU, else float32, if not given.")
@click.option("--device", help="cuda if there is one, else cpu, if not given.")
@click.option(
    "--threads", type=click.IntRange(1, os.cpu_count()), default=1, show_default=True, help="Of the CPU."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="For the repeats of a row.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path(__file__).parent / "results"
)
def main(
    device: str | None, dtype: str | None, threads: int, seconds: float, out: Path, **asked: Any
) -> None:
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
        raise click.ClickException(f"these forms of ours failed: {', '.join(sorted(failed))}")


def command(options: dict[str, Any]) -> str:
    """What repeats this run, without the folder that it wrote to."""
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
    """The rows of one phase: all forms at all sizes. What a form cannot do is said in its row."""
    found, failed, ready = {}, {}, {}
    for sizes in several:
        click.echo(f"{phase}, {sizes.tokens:,} tokens", err=True)
        generator = torch.Generator().manual_seed(seed)
        shape = (sizes.batch, sizes.tokens, sizes.heads, sizes.dim)
        # As a model's projections lie in memory: tokens before heads.
        drawn = (torch.randn(shape, generator=generator).to(device, sizes.dtype) for _ in range(4))
        tensors = [x.transpose(1, 2) for x in drawn]
        for name, form in forms(sizes, device, generator).items():
            found[sizes, name] = form
            try:
                ready[sizes, name] = warm(form, phase, tensors, device)
            except Exception as error:  # other libraries raise what they like where a device is not theirs
                failed[sizes, name] = brief(error)
    order = sorted(
        ready, key=lambda place: place[1]
    )  # a form after itself, not after what empties the caches
    seconds = interleaved({place: ready[place].run for place in order}, device, REPEATS, budget)
    runs = STEPS if phase == DECODE else 1
    middle = {place: median(times) / runs for place, times in seconds.items()}
    rows = []
    for (sizes, name), form in found.items():
        place, work = (sizes, name), form.work(sizes, phase)
        softmax = [took for (at, other), took in middle.items() if at == sizes and other.startswith(SDPA)]
        took, floor = middle.get(place), rates.floor(work)
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
                "peak_bytes": ready[place].peak if place in ready else None,
                "repeats": len(seconds.get(place, ())),
                "reason": failed.get(place),
            }
        )
    return rows


def warm(form: Form, phase: str, tensors: list[Tensor], device: torch.device) -> Ready:
    def prepare() -> Run:
        run = form.ready(phase, *tensors)
        run()
        return run

    return Ready(*peak_bytes(prepare, lambda run: run(), device))


def markdown(report: dict[str, Any]) -> str:
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
    """A panel for each phase: ms by context of each form, and its floor as a dotted line."""
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
