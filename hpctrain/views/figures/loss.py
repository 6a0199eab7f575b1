"""Loss and metric on the four clocks of a run: python analysis/loss.py RUN -o loss.png

The columns are updates, samples, seconds of training (without evaluations and checkpoints), and bytes exchanged by
all ranks. The thin line is the training loss of every update, the thick one its running mean; points are evaluations.
Dashed lines are where phases begin.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.text import escaped
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    BLUE,
    GREEN,
    SKY,
    VERMILLION,
    first_of_phases,
    in_unit,
    literal,
    mark_phases,
    new_figure,
    smoothed,
)

SPLITS = {"validation": VERMILLION, "test": GREEN}
CLOCKS = {"step": "updates", "samples": "samples", "seconds": "training time (s)", "bytes": "bytes exchanged ({})"}


def draw(analysis: Analysis) -> Figure:
    """Loss above, metric below (if there were evaluations), with a column for each clock."""
    losses, metrics = analysis.convergence, analysis.metrics
    if losses.empty:
        raise NothingToShow("no step was finished, so there is no loss to show")
    rows = 2 if len(metrics) else 1
    figure = new_figure(analysis, "Convergence", 12, 1.2 + 2.6 * rows)
    grid = figure.subplots(rows, 4, sharey="row", sharex="col", squeeze=False)
    smooth = smoothed(losses)
    for clock, column in zip(CLOCKS, grid.T, strict=True):
        factor, unit = in_unit(losses["bytes"]) if clock == "bytes" else (1.0, "")
        column[0].plot(losses[clock] * factor, losses["loss"], color=SKY, linewidth=0.5, alpha=0.6, rasterized=True)
        column[0].plot(losses[clock] * factor, smooth, color=BLUE, linewidth=1.5, label="training loss, running mean")
        for axes, name in zip(column, ("loss", "metric"), strict=False):
            _draw_evaluations(axes, metrics, clock, factor, name)
            mark_phases(axes, first_of_phases(losses, clock, factor))
            axes.grid(alpha=0.3)
        column[-1].set_xlabel(CLOCKS[clock].format(unit))
        column[-1].ticklabel_format(axis="x", style="plain", useOffset=False)
        column[-1].tick_params(axis="x", labelsize=8)
    grid[0, 0].set_ylabel(f"loss ({_named(analysis, 'loss')})")
    grid[-1, 0].set_ylabel(_named(analysis, "metric") if rows == 2 else grid[0, 0].get_ylabel())
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_evaluations(axes: Axes, metrics: pd.DataFrame, clock: str, factor: float, name: str) -> None:
    for split, mine in metrics.groupby("split"):
        style = "-o" if len(mine) > 1 else "D"
        axes.plot(mine[clock] * factor, mine[name], style, color=SPLITS.get(str(split), VERMILLION), markersize=4,
                  linewidth=1, label=str(split))  # fmt: skip


def _named(analysis: Analysis, key: str) -> str:
    """The job's name for its loss or metric."""
    job = analysis.run.job
    found = getattr(job, "measured", key) if key == "metric" else getattr(getattr(job, key, None), "name", key)
    return literal(escaped(str(found)))


if __name__ == "__main__":
    main(draw)
