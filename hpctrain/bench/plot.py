"""One picture of all comparisons: each value with its interval and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OTHER, COLOURS = "tab:gray", {"met": "tab:green", "not met": "tab:red"}


def draw(comparisons: Sequence[Mapping[str, Any]], path: str) -> None:
    """Write a PNG. `comparisons`: plain ones (`Comparison.plain`); differences, which have units, are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [each for each in comparisons if not each["what"].endswith(", us") and each["value"] == each["value"]]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, each in enumerate(shown):
        colour = COLOURS.get(each.get("verdict", ""), OTHER)
        axes.plot([each["low"], each["high"]], [place, place], color=colour, linewidth=2)
        axes.plot([each["value"]], [place], "o", color=colour)
        if "target" in each:
            axes.plot([float(each["target"].split()[-1])], [place], "|", color="black", markersize=14)
    axes.axvline(1.0, color="lightgray", zorder=0)
    axes.set_yticks(range(len(shown)), [f"{each['what']}, {each['column']}" for each in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    values = [each["value"] for each in shown]
    axes.set_xlim(min([0.0, *values]) - 0.1, max([1.5, *values]) * 1.2)
    legend = "ratio with 95 % interval; black: target; green: met, red: not met, gray: no target, or not certain"
    figure.supxlabel(legend, fontsize=9)
    FigureCanvasAgg(figure).print_png(path)
