"""The figures of a page, as SVG that takes the page's colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, StrMethodFormatter

from linearize_cli.metrics import plots
from linearize_cli.tables import size

INK = "#010203"  # the colour of text and axes in the figures, which is replaced by the page's
INKS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
CONTEXTS = [2**power for power in range(7, 18)]  # tokens, of the figure of memory


def svg(name: str, draw: Callable[[], Figure | None]) -> str | None:
    """Return a figure as an SVG element, or None if there is none to draw.

    Args:
        name: says what the figure shows, for readers who do not see it. No other figure of the page may have it,
            because the ids in the SVG follow from it.
        draw: returns the figure.
    """
    style = {**dict.fromkeys(INKS, INK), "svg.fonttype": "none", "svg.hashsalt": name}
    with rc_context(style):
        figure = draw()
        if figure is None:
            return None
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    label = f' role="img" aria-label="{escape(name)}"'
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', lambda size: label, element, count=1)


def memory(record: dict[str, Any]) -> Figure | None:
    """Draw the memory of one sequence by context: the linear layers' state, and the KV cache that it replaces.
    Return None for an encoder, which has neither.
    """
    state, per_token = record["state_bytes"], record["kv_bytes_per_token"]
    if not state or not per_token:
        return None
    drawing, axes = plots.figure("memory of one sequence", "context, tokens", "")
    axes.plot(CONTEXTS, [per_token * n for n in CONTEXTS], label="KV cache (softmax)", **plots.TEACHER)
    axes.plot(CONTEXTS, [state] * len(CONTEXTS), label="state (linear)", **plots.STUDENT)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.legend(frameon=False, fontsize=8)
    return drawing


def speed(report: dict[str, Any], phase: str) -> Figure | None:
    """Draw the tokens/s of both models by context in one phase of a report of `bench`. Return None without data."""
    drawing, axes = plots.figure(phase, "context, tokens", "tokens/s")
    plots.draw_panel(axes, report, phase, [phase], "tokens_per_s", "tokens/s")
    return drawing if axes.lines else None
