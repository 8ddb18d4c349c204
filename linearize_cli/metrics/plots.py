"""The figures of `eval` and `bench`."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, StrMethodFormatter

from linearize_cli.files import cannot_write, replacing
from linearize_cli.tables import size

TEACHER, STUDENT = {"color": "0.45", "linestyle": "--"}, {"color": "C0"}
MARKERS = "os^vDP"
MEMORY = "memory"  # the label of an axis in bytes, which are shown as MB or GB
SMOOTHED = 50  # the most points of a training curve, each the mean of several steps


def figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure and its only set of axes. It needs no display.

    Args:
        title: the title.
        x, y: the labels of the axes.
    """
    drawing = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = drawing.subplots()
    name_axes(axes, title, x, y)
    return drawing, axes


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels `x` and `y` of axes, and the style that all figures share."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(drawing: Figure, path: Path) -> None:
    """Write a figure as a PNG file. An existing file is replaced only when the new one is complete.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=150)
    except OSError as error:
        raise cannot_write(path, error) from error


def titled(what: str, report: dict[str, Any]) -> str:
    """Return a figure's title: what it shows, of which method, in which dtype."""
    return f"{what} ({report['method']}, {report['dtype']})"


def by_position(report: dict[str, Any]) -> Figure | None:
    """Draw the perplexity of both models by position in the block, from a report of `eval`. Return None
    without data.
    """
    parts = [part for part in report["perplexity"]["by_position"] or () if part["teacher"] is not None]
    if not parts:
        return None
    drawing, axes = figure(
        titled("perplexity by position", report), "position in the block, tokens", "perplexity"
    )
    middles = [(part["start"] + part["end"]) / 2 for part in parts]
    for name, style in (("teacher", TEACHER), ("student", STUDENT)):
        axes.plot(middles, [part[name] for part in parts], label=name, marker="o", markersize=3, **style)
    values = [part[name] for part in parts for name in ("teacher", "student")]
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    contexts = report["contexts"]
    for key, label, line in (("trained", "trained length", ":"), ("teacher", "teacher's context", "-.")):
        if contexts[key] and contexts[key] <= parts[-1]["end"]:
            axes.axvline(contexts[key], color="0.7", linestyle=line, linewidth=1, label=label)
    axes.legend(frameon=False, fontsize=8)
    return drawing


def by_distance(report: dict[str, Any]) -> Figure | None:
    """Draw the recall of both models by distance, from a report of `eval`. Return None without data."""
    measures = {name: report[name] for name in ("recall", "passkey") if report[name]}
    if not measures:
        return None
    drawing, axes = figure(
        titled("recall by distance", report), "tokens since the fact was stated", "share recalled"
    )
    for (measure, values), marker in zip(measures.items(), "os", strict=False):
        parts = [part for part in values["by_distance"] if part["teacher"] is not None]
        at = [(part["distance"] + part.get("until", part["distance"])) / 2 for part in parts]
        for name, style in (("teacher", TEACHER), ("student", STUDENT)):
            shares = [part[name] for part in parts]
            axes.plot(at, shares, label=f"{measure}, {name}", marker=marker, markersize=4, **style)
    if report["window"]:
        axes.axvline(report["window"], color="0.7", linestyle=":", linewidth=1, label="window")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8)
    return drawing


def transfer(log: Path) -> Figure | None:
    """Draw each layer's loss over the steps of attention transfer, from the conversion's log.

    Returns:
        The figure, or None if the log is missing or damaged, or has no such steps.
    """
    curves = defaultdict(list)
    try:
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
            record = json.loads(line)
            if record.get("stage") == "transfer":
                for layer, loss in record.get("layers", {}).items():
                    curves[layer].append((int(record["step"]), float(loss)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # a damaged log must not lose the rest of the report
    if not curves:
        return None
    drawing, axes = figure("attention transfer by layer", "step", "relative error of the layer's output")
    colours = colormaps["viridis"]
    for number, (layer, points) in enumerate(curves.items()):
        width = -(-len(points) // SMOOTHED)
        means = [points[i : i + width] for i in range(0, len(points), width)]
        steps, losses = zip(
            *((part[-1][0], sum(x for _, x in part) / len(part)) for part in means), strict=True
        )
        colour = colours(0.2 + number / max(1, len(curves) - 1) * 0.7)
        axes.plot(steps, losses, label=layer, color=colour, linewidth=1)
    axes.set_yscale("log")
    if len(curves) <= 12:
        axes.legend(frameon=False, fontsize=6)
    return drawing


def by_context(report: dict[str, Any]) -> Figure:
    """Draw a report of `bench`: a panel of tokens/s for each phase, and two panels of memory below."""
    phases = list(dict.fromkeys(row["phase"] for row in report["rows"]))
    panels = [(phase, [phase], "tokens_per_s", "tokens/s") for phase in phases]
    cached = [phase for phase in ("decode", "prefill") if phase in phases][:1]
    panels += [
        ("cache after the context", cached, "state_bytes", MEMORY),
        ("peak memory", phases, "peak_bytes", MEMORY),
    ]
    drawing = Figure(figsize=(10, 6), layout="constrained")
    on = report["machine"]
    drawing.suptitle(f"{report['method']} and its teacher, {report['dtype']}, {on['gpu'] or on['cpu']}")
    grid = [*drawing.subplots(2, 3).flat]
    for axes in (*grid[len(phases) : 3], grid[5]):
        axes.set_axis_off()
    for axes, panel in zip((*grid[: len(phases)], *grid[3:5]), panels, strict=True):
        draw_panel(axes, report, *panel)
    return drawing


def draw_panel(
    axes: Axes, report: dict[str, Any], title: str, phases: list[str], key: str, unit: str
) -> None:
    """Draw one measurement by context, with a line for each model, phase and batch size.

    Args:
        phases: the phases to draw.
        key: the measurement's key in the report's rows.
        unit: the label of the y axis.
    """
    name_axes(axes, title, "context, tokens", unit)
    batches, several = list(dict.fromkeys(row["batch"] for row in report["rows"])), len(phases) > 1
    for (model, phase, batch), points in series(report["rows"], phases, key).items():
        label = ", ".join([model, *[phase] * several, *[f"batch {batch}"] * (len(batches) > 1)])
        marker = MARKERS[(phases.index(phase) if several else batches.index(batch)) % len(MARKERS)]
        style = TEACHER if model == "teacher" else STUDENT
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, **style)
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if unit == MEMORY:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend = axes.legend(frameon=False, fontsize=7)
    if several:  # the legend goes into the empty panel on the right
        legend.set(loc="upper left", in_layout=False)
        legend.set_bbox_to_anchor((1, 1))


def series(
    rows: list[dict[str, Any]], phases: list[str], key: str
) -> dict[tuple[str, str, int], list[tuple[int, float]]]:
    """Return the points `(context, value)` of each model, phase and batch size, sorted by context.

    Args:
        rows: the rows of a report of `bench`. Rows without a value are skipped.
        phases: the phases to include.
        key: the measurement's key in a row.
    """
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["context"]):
        if row["phase"] in phases and row[key] is not None:
            found[row["model"], row["phase"], row["batch"]].append((row["context"], row[key]))
    return found
