"""Parallel efficiency by phase, and what each rank did: python analysis/efficiency.py RUN -o efficiency.png

Above, the factors of the POP model for each phase: parallel efficiency is load balance times communication efficiency;
100 % is a phase in which all workers compute all the time. Below, the seconds of every rank by kind of span, over all
phases; blue, green and yellow are computation.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.trace.schema import THREADS
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    BLUE,
    GREEN,
    KIND_COLOURS,
    ORANGE,
    legend,
    name_rows,
    new_figure,
    rows_height,
    shown_phases,
)

MOST = 12  # phases
TERMS = {"parallel_efficiency": BLUE, "load_balance": GREEN, "communication_efficiency": ORANGE}


def draw(analysis: Analysis) -> Figure:
    """Two panels: factors of the POP model by phase (%), time by rank and kind (s)."""
    terms, times = analysis.efficiency, analysis.times
    if terms.empty:
        raise NothingToShow("no worker has finished a step, so there is no efficiency to show")
    phases, fewer = shown_phases(analysis, terms["phase"], MOST)
    terms = terms[terms["phase"].isin(phases)]
    above, below = 0.4 + 0.5 * len(terms), max(2.0, rows_height(len(times.groupby(["rank", "lane"]))))
    figure = new_figure(analysis, f"Efficiency by the POP model{fewer}", 9, 1.4 + above + below)
    upper, lower = figure.subplots(2, height_ratios=[above, below])
    _draw_terms(upper, terms)
    _draw_times(lower, times)
    return figure


def _draw_terms(axes: Axes, terms: pd.DataFrame) -> None:
    names = [f"phase {t.phase}: {t.strategy}\nworkers: {t.workers}, {t.seconds:.3g} s" for t in terms.itertuples()]
    for i, (name, colour) in enumerate(TERMS.items()):
        place = np.arange(len(terms)) + 0.27 * (i - 1)
        bars = axes.barh(place, 100 * terms[name], 0.25, color=colour, label=name.replace("_", " "))
        axes.bar_label(bars, fmt="%.0f %%", fontsize=8, padding=2)
    name_rows(axes, names)
    axes.set_xlim(0, 112)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("share of the ideal (%)")
    legend(axes)


def _draw_times(axes: Axes, times: pd.DataFrame) -> None:
    kinds = [kind for kind in KIND_COLOURS if kind in times.columns and times[kind].sum() > 0]
    lanes = times.groupby(["rank", "lane"])[[*kinds, "total_s"]].sum()
    left = np.zeros(len(lanes))
    for kind in kinds:
        axes.barh(range(len(lanes)), lanes[kind], 0.8, left=left, color=KIND_COLOURS[kind], label=kind)
        left += lanes[kind].to_numpy()
    name_rows(axes, [f"{rank} {THREADS[lane]}" if lane else str(rank) for rank, lane in lanes.index])
    axes.set_ylabel("rank")
    axes.set_xlabel("time (s)")
    legend(axes)


if __name__ == "__main__":
    main(draw)
