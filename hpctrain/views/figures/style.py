"""How all figures look: colours that colour-blind people can tell apart, titles, notes, marks of phases."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.analysis.phases import longest
from hpctrain.text import escaped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hpctrain.analysis import Analysis

# The palette of Okabe and Ito (2008); line styles distinguish ranks of the same colour.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW, BLACK = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
LINES = tuple(colour for colour in COLOURS if colour != YELLOW)  # yellow is too light for a line
STYLES = ("-", "--", ":", "-.")
GREY = "#999999"
MANY = 8  # more lines than this cannot be distinguished
MOST_PHASES = 60  # marked by lines; more would hide the data

# In the order in which they are stacked. Computing is blue to green, communication orange to red, waiting light.
KIND_COLOURS = {
    "forward": BLUE,
    "backward": SKY,
    "update": GREEN,
    "data": YELLOW,
    "encode": "#44AA99",
    "decode": "#AADDCC",
    "send": ORANGE,
    "recv": "#F7D58F",
    "reduce": VERMILLION,
    "notify": GREY,
    "wait": "#DDDDDD",
    "evaluate": PURPLE,
    "checkpoint": "#882255",
    "switch": BLACK,
    "trace": "#666666",
}


def new_figure(analysis: Analysis, about: str, width: float = 9.0, height: float = 5.0) -> Figure:
    """An empty figure (size in inches) titled with its subject, the run's name and the notes on what is missing."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05))
    run = analysis.run
    lines = [f"{about} ({escaped(run.folder.resolve().name)})"]
    for note in run.notes[:4]:
        lines += textwrap.wrap(f"note: {note}", int(12 * width))
    if len(run.notes) > 4:
        lines.append(f"and {len(run.notes) - 4} more notes")
    figure.suptitle(literal("\n".join(lines)), fontsize=10)
    return figure


def literal(text: str) -> str:
    """Escape dollar signs in `text`: matplotlib would take text between two of them as a formula, or fail."""
    return text.replace("$", r"\$")


def rows_height(rows: int) -> float:
    """Height in inches of axes with a row per rank."""
    return float(np.clip(0.28 * rows, 1.2, 8.0))


def name_rows(axes: Axes, names: Sequence[str], least: int = 1) -> None:
    """Label rows 0, 1, 2 ... from the top (every second or third if there are many); make room for at least `least`."""
    every = 1 + (len(names) - 1) // 32 if names else 1
    axes.set_yticks(range(0, len(names), every), list(map(literal, names[::every])), fontsize=8)
    axes.set_ylim(max(len(names), least) - 0.5, -0.5)


def look(index: int) -> dict[str, Any]:
    """Colour and style of the index-th of several lines."""
    return {"color": LINES[index % len(LINES)], "linestyle": STYLES[index // len(LINES) % len(STYLES)]}


def rank_lines(axes: Axes, courses: Mapping[int, tuple[Any, Any]], extreme: str = "lowest", what: str = "rank") -> None:
    """Draw a line per rank (or node: `what`) from {rank: (x, y)}. If there are many, only the three with the `extreme`
    ("lowest", "highest") means are coloured."""
    shown = len(courses) if len(courses) <= MANY else 3
    means = {rank: float(np.nanmean(y)) if np.isfinite(y).any() else 0.0 for rank, (_, y) in courses.items()}
    order = sorted(means, key=means.__getitem__, reverse=extreme == "highest")
    for rank in order[shown:]:
        axes.plot(*courses[rank], color="#BBBBBB", linewidth=0.6, zorder=1)
    for i, rank in enumerate(sorted(order[:shown])):
        axes.plot(*courses[rank], label=f"{what} {rank}", linewidth=1.3, **look(i))
    if shown < len(courses):
        axes.plot([], [], color="#BBBBBB", linewidth=0.6, label=f"the other {len(courses) - shown}")


def legend(axes: Axes, columns: int = 1) -> None:
    """Add a legend to the right of the axes, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=8, ncols=columns)


def from_zero(axes: Axes) -> None:
    """Start the vertical axis at 0, with a little room above the data."""
    axes.set_ylim(0, 1.05 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1.0)


def mark_share(axes: Axes, share: float, colour: str) -> None:
    """Draw a dashed horizontal line, labelled with its value."""
    axes.axhline(share, color=colour, linestyle="--", linewidth=1.0)
    axes.annotate(f"even: {share:.3g} %", (1.0, share), xycoords=("axes fraction", "data"), xytext=(4, 0),
                  textcoords="offset points", va="center", fontsize=8, color=colour)  # fmt: skip


def mark_phases(axes: Axes, starts: Mapping[int, float], names: Mapping[int, str] | None = None) -> None:
    """Draw a line at the start of each phase except the first, with `names` above the axes. Draws nothing if there are
    more than MOST_PHASES."""
    if len(starts) > MOST_PHASES:
        return
    for x in sorted(starts.values())[1:]:
        axes.axvline(x, color=BLACK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=3)
    if names and len(starts) > 1:
        texts = [f" {phase}" if len(starts) > 4 else f" {names[phase]}" for phase in starts]
        top = axes.secondary_xaxis("top")
        top.set_xticks(list(starts.values()), texts, ha="left")
        top.tick_params(length=0, labelsize=8)


def phase_names(analysis: Analysis) -> dict[int, str]:
    """{phase: "phase 1: all_reduce"}."""
    found = analysis.phases.drop_duplicates("phase").sort_values("phase")
    pairs = zip(found["phase"], found["strategy"], strict=True)
    return {int(phase): literal(f"phase {phase}: {name}") for phase, name in pairs}


def shown_phases(analysis: Analysis, having: pd.Series[Any], most: int) -> tuple[list[int], str]:
    """(phases to show among those in the column `having`, text on the others for a title: "" if there are none)."""
    own = analysis.phases[analysis.phases["phase"].isin(having)]
    count = own["phase"].nunique()
    if count <= most:
        return sorted(having.unique().tolist()), ""
    return longest(own, most), f", the {most} longest of {count:,} phases"


def phase_starts(analysis: Analysis) -> dict[int, float]:
    """Start of each phase in seconds since the run's first span."""
    starts = analysis.phases.groupby("phase")["start_ns"].min() - analysis.run.start_ns
    return {int(phase): start / 1e9 for phase, start in zip(starts.index, starts, strict=True)}


def first_of_phases(losses: pd.DataFrame, clock: str, factor: float = 1.0) -> dict[int, float]:
    """Start of each phase on a clock of Analysis.convergence, times `factor`: at the last update before it."""
    ended = losses[clock].shift(1, fill_value=0)[~losses["phase"].duplicated()] * factor
    return {int(losses["phase"][i]): float(x) for i, x in zip(ended.index, ended, strict=True)}


def smoothed(losses: pd.DataFrame) -> pd.Series[float]:
    """Running means of the losses of Analysis.convergence over a 25th of each phase's updates."""

    def smooth(own: pd.Series[float]) -> pd.Series[float]:
        return own.rolling(max(1, len(own) // 25), min_periods=1, center=True).mean()

    return losses.groupby("phase")["loss"].transform(smooth)


def short(value: float) -> str:
    """Format with at least two digits, for the cells of a matrix."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def in_unit(values: pd.Series[Any] | np.ndarray[Any, Any], unit: str = "B") -> tuple[float, str]:
    """(factor, unit) that makes the largest of `values` readable: bytes become KiB, MiB, GiB or TiB if large."""
    largest = float(np.nanmax(values)) if len(values) and np.isfinite(values).any() else 0.0
    step = min(4, int(np.log2(largest) // 10)) if largest >= 1 else 0
    return 1024.0**-step, ("", "Ki", "Mi", "Gi", "Ti")[step] + unit
