"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpctrain.study.table import LIMITS, Line

PLAIN, WIRE = "tab:blue", ("#c6dbef", "#6baed6", "#2171b5")


def draw_rows(found: Sequence[Line], base: str, metric: str, path: Path) -> None:
    """Beside each other, a row each: what is reached, with its spread, and what is sent (logarithmic)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.26 * len(found)), layout="constrained", dpi=90)
    reached, sent = figure.subplots(1, 2, sharey=True)
    for place, line in enumerate(found):
        reached.errorbar(line.mean, place, xerr=line.spread, fmt="o", color=PLAIN, capsize=3, markersize=5)
        for value, marker, name in ((line.payload, "o", "payload"), (line.busiest, "s", "busiest link")):
            colour = WIRE[2] if marker == "o" else WIRE[1]
            sent.plot(value, place, marker, color=colour, markersize=5, label=name if place == 0 else None)
        if line.row == base:
            reached.axvline(line.mean, color="lightgray", zorder=0)
    reached.set_yticks(range(len(found)), [line.row for line in found], fontsize=8)
    reached.invert_yaxis()
    reached.locator_params(axis="x", nbins=6)
    reached.set_xlabel(f"{metric}: mean and standard deviation")
    sent.set_xscale("log")
    sent.set_xlabel("bytes per step (logarithmic)")
    sent.legend(fontsize=8)
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
