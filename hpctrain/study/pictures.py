"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpctrain.study.table import LIMITS, Line

ACCENT, PLAIN, WIRE = "tab:red", "tab:blue", ("#c6dbef", "#6baed6", "#2171b5")


def draw_trade(found: Sequence[Line], base: str, metric: str, path: Path) -> None:
    """What is sent against what is reached: payload per step (logarithmic) and the metric, with its spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained", dpi=90)
    axes = figure.add_subplot()
    for number, line in enumerate(found):
        colour = ACCENT if line.row == base else PLAIN
        axes.errorbar(line.payload, line.mean, yerr=line.spread, fmt="o", color=colour, capsize=2, markersize=4)
        place = (5, 4) if number % 2 else (5, -10)
        axes.annotate(line.row, (line.payload, line.mean), place, textcoords="offset points", fontsize=7)
    for line in found:
        if line.row == base:
            axes.axhline(line.mean, color="lightgray", zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("payload per worker and step, bytes (logarithmic)")
    axes.set_ylabel(f"{metric}, mean and standard deviation over seeds")
    FigureCanvasAgg(figure).print_png(str(path))


def draw_times(found: Sequence[Line], here: Mapping[str, float], path: Path) -> None:
    """Milliseconds per step (logarithmic) on one host and at each limit of the wire."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [line for line in found if line.row in here]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained", dpi=90)
    axes = figure.add_subplot()
    for place, line in enumerate(shown):
        own = here[line.row]
        axes.plot(own, place, "|", color="black", markersize=10, label="one host (measured)" if place == 0 else None)
        for colour, (name, limit) in zip(WIRE, LIMITS.items(), strict=True):
            step = own + line.wire_seconds(limit) * 1e3
            axes.plot(step, place, "o", color=colour, label=f"{name} (computed)" if place == 0 else None)
    axes.set_yticks(range(len(shown)), [line.row for line in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per step (logarithmic)")
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
