"""The comparison as pictures: losses and metrics over time, bars, and how runs scale. Loads matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from hpctrain.errors import HpctrainError
from hpctrain.text import escaped
from hpctrain.views.compare.scaling import MEASURES, curves
from hpctrain.views.compare.summary import RunSummary
from hpctrain.views.compare.table import clip, number
from hpctrain.views.compare.targets import Targets
from hpctrain.views.figures.style import GREY, LINES, literal, look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Runs = Mapping[str, RunSummary]  # by letter
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CLOCK = "training time (s), without evaluation and checkpoints"
NOTES, LINE = 4, 0.18  # the most notes in a picture; height of a line of text in inches


def write_plots(folder: Path, frame: pd.DataFrame, runs: Runs, targets: Targets, notes: Sequence[str]) -> list[Path]:
    """Write the pictures that have something to show into `folder` (created if needed); returns their paths.

    Raises HpctrainError if that fails.
    """
    figures = {"loss": draw_loss(runs, targets), "metric": draw_metric(runs, targets), "bars": draw_bars(frame, runs)}
    if "baseline" in frame:
        figures["scaling"] = draw_scaling(frame)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure is not None:
                _note(figure, notes)
                figure.savefig(folder / f"{name}.png", dpi=150)
                written.append(folder / f"{name}.png")
    except OSError as error:
        raise HpctrainError(
            f"{folder}: the pictures cannot be written here ({error.strerror or error}); choose another folder with -o"
        ) from None
    return written


def draw_loss(runs: Runs, targets: Targets) -> Figure | None:
    """Draw training loss against training time; None if no run has losses."""
    figure, axes = _over_time(f"training loss (mean of {max(1, round(targets.window)):,} samples)")
    for index, (letter, run) in enumerate(runs.items()):
        rows = run.mean_losses(targets.window)
        if len(rows):
            axes.plot(rows["seconds"], rows["loss"], label=_label(letter, run), linewidth=1.5, **look(index))
    return _finish(figure, axes, targets.loss)


def draw_metric(runs: Runs, targets: Targets) -> Figure | None:
    """Draw the metric of every evaluation against training time; None if no run was evaluated."""
    kinds = dict.fromkeys(f"{run.split} {run.metric}" for run in runs.values() if run.split)
    figure, axes = _over_time(literal(escaped(" or ".join(kinds))))
    for index, (letter, run) in enumerate(runs.items()):
        rows = run.course
        if len(rows):
            style = look(index) | {"marker": MARKERS[(index + index // len(LINES)) % len(MARKERS)]}
            axes.plot(rows["seconds"], rows["metric"], label=_label(letter, run), markersize=5, linewidth=1.5, **style)
    return _finish(figure, axes, targets.metric)


def draw_bars(frame: pd.DataFrame, runs: Runs) -> Figure:
    """A panel each for times to the targets, samples per second and cost, if known, with a bar per run."""
    first = frame.iloc[0]
    metric = literal(escaped(first["metric_name"]))
    titles = {
        "time_to_loss_s": f"training time to loss {first['target_training_loss']:.4g} (s)",
        "time_to_metric_s": f"training time to {metric} {first['target_metric']:.4g} (s)",
        "samples_per_s": "throughput (samples/s)",
        "cost_rank_s": "cost (rank-seconds)",
    }
    shown = [name for name in titles if frame[name].notna().any()] or ["cost_rank_s"]
    across, down = min(2, len(shown)), -(-len(shown) // 2)
    figure = Figure(figsize=(3.0 + 4.5 * across, (0.32 * len(frame) + 1.1) * down), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, name in zip(grid, shown, strict=False):
        _bars(axes, frame[name].to_numpy(float))
        axes.set_yticks(np.arange(len(runs)), [_label(*item) for item in runs.items()], fontsize=8)
        axes.set_xlabel(titles[name])
    for axes in grid[len(shown) :]:
        axes.remove()
    return figure


def draw_scaling(frame: pd.DataFrame) -> Figure:
    """Speed-up, scaling efficiency and computation scaling over the number of ranks, with ideal lines.

    Points are runs; lines connect the means over a strategy's runs with the same number of ranks.
    """
    baseline = frame[frame["run"] == frame["baseline"]].iloc[0]
    base, ranks = int(baseline["ranks"]), np.unique(frame["ranks"])
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    titles = ("speed-up (ratio)", "scaling efficiency (%)", "computation scaling (ratio)")
    ideals = (ranks / base, np.full(len(ranks), 100.0), np.ones(len(ranks)))
    panels = zip(figure.subplots(1, 3), MEASURES, titles, ideals, strict=True)
    for axes, name, title, ideal in panels:
        factor = 100.0 if "%" in title else 1.0
        axes.plot(ranks, ideal, color=GREY, linestyle="--", linewidth=1.2, marker="_", markersize=12, label="ideal")
        for index, (way, mine) in enumerate(curves(frame).items()):
            style = {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}
            means = factor * mine.groupby("ranks")[name].mean()
            axes.plot(mine["ranks"], factor * mine[name], linestyle="none", markersize=5, alpha=0.6, **style)
            style |= {"fillstyle": "none", "label": literal(clip(way, 44))}
            axes.plot(means.index, means, linewidth=1.5, markersize=8, **style)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        _scale_ranks(axes, ranks)
        if name == "speed_up" and axes.get_xscale() == "log":  # so that the ideal is a straight line here too
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.1 * max(np.nanmax(line.get_ydata()) for line in axes.lines))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    many = "s" * (base > 1)
    head = literal(escaped(f"baseline: {baseline['name']}, {baseline['strategy']} on {base} rank{many}"))
    figure.suptitle(f"{head}\nfilled: runs; open: means of a strategy's runs on the same number of ranks", fontsize=9)
    return figure


# -- parts ---------------------------------------------------------------------------------------------------
def _over_time(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(CLOCK)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, axes: Axes, target: float) -> Figure | None:
    if not axes.lines:
        return None
    if math.isfinite(target):
        axes.axhline(target, color=GREY, linestyle=(0, (1, 3)), linewidth=1.5, label=f"target {target:.4g}")
    axes.set_xlim(left=0)
    rows = -(-len(axes.get_legend_handles_labels()[1]) // 2)
    figure.set_figheight(figure.get_figheight() + LINE * rows)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _note(figure: Figure, notes: Sequence[str]) -> None:
    """Write the first few notes above the picture, below its title."""
    lines = [figure.get_suptitle()] if figure.get_suptitle() else []
    for note in notes[:NOTES]:
        lines += textwrap.wrap(literal(escaped(f"note: {note}")), int(13 * figure.get_figwidth()))
    if len(notes) > NOTES:
        lines.append(f"and {len(notes) - NOTES} more notes")
    if lines:
        figure.set_figheight(figure.get_figheight() + LINE * len(lines))
        figure.suptitle("\n".join(lines), fontsize=9)


def _label(letter: str, run: RunSummary) -> str:
    return literal(f"{letter}  {clip(run.strategy, 36)}, {run.crew}")


def _bars(axes: Axes, values: Any) -> None:
    lengths = np.where(np.isfinite(values), values, 0.0)
    axes.barh(np.arange(len(values)), lengths, color=[LINES[i % len(LINES)] for i in range(len(values))], height=0.7)
    for place, value in enumerate(values):
        text = "not known" if math.isnan(value) else number(value)
        at = (lengths[place], place)
        axes.annotate(text, at, (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(lengths.max(), 1e-9))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _scale_ranks(axes: Axes, ranks: Any) -> None:
    """Scale the axis of ranks: logarithmic if they differ by more than a factor of 8; a tick for each if few."""
    if ranks[-1] / ranks[0] > 8:
        axes.set_xscale("log", base=2)
    if len(ranks) <= 10:
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.minorticks_off()
    axes.set_xlabel("ranks, servers included")
