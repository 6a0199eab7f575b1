"""Samples per second of every worker over time: python analysis/throughput.py RUN -o throughput.png

Above, all workers together; below, each one. Means over equal stretches of the run; evaluations and checkpoints
show as dips. In asynchronous phases a slow worker is the low line; in synchronous ones all workers run at its pace.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    BLACK,
    from_zero,
    legend,
    mark_phases,
    new_figure,
    phase_names,
    phase_starts,
    rank_lines,
)


def draw(analysis: Analysis) -> Figure:
    """Two panels over seconds since the run's first span, in samples/s."""
    steps = analysis.run.steps()
    if len(steps) < 2:
        raise NothingToShow("fewer than two steps were finished, so there is no throughput")
    start = min([steps["t_s"].min(), *phase_starts(analysis).values()])
    if steps["t_s"].max() <= start:
        raise NothingToShow("all steps were finished at the same time, so there is no throughput")
    per_rank = len(steps) // steps["rank"].nunique()
    edges = np.linspace(start, steps["t_s"].max(), int(np.clip(per_rank // 10, 10, 100)) + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    rates: dict[Any, Any] = {}
    for rank, mine in steps.groupby("rank"):
        rate = np.histogram(mine["t_s"], edges, weights=mine["samples"])[0] / width
        worked = (middles > mine["t_s"].min() - width) & (middles <= mine["t_s"].max())
        rates[rank] = middles, np.where(worked, rate, np.nan)
    figure = new_figure(analysis, f"Throughput, means of {width:.2g} s", 9, 5.5)
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(middles, np.nansum([rate for _, rate in rates.values()], axis=0), color=BLACK, linewidth=1.3)
    upper.set_ylabel("all workers (samples/s)")
    rank_lines(lower, rates)
    lower.set_ylabel("each worker (samples/s)")
    lower.set_xlabel("time since the first span (s)")
    legend(lower)
    for axes, names in ((upper, phase_names(analysis)), (lower, None)):
        from_zero(axes)
        axes.set_xlim(start, edges[-1])
        axes.grid(alpha=0.3)
        mark_phases(axes, phase_starts(analysis), names)
    return figure


if __name__ == "__main__":
    main(draw)
