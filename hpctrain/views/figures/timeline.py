"""What each rank did and when, by kind of span: python analysis/timeline.py RUN -o timeline.png

A row per rank, and one per colocated server's thread. Time is cut into 1,200 columns; where several kinds share a
column their heights in the row are their shares of it. White is time that no span covers. Dashed lines are where
phases begin, triangles are events; neither is drawn if there are very many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hpctrain.analysis import Analysis
from hpctrain.trace.schema import KINDS, THREADS
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.raster import kind_shares, paint
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    KIND_COLOURS,
    VERMILLION,
    mark_phases,
    name_rows,
    new_figure,
    phase_names,
    phase_starts,
    rows_height,
)

COLUMNS = 1200
MOST_MARKS = 200  # per kind of event; more would form a solid bar across the figure
MARKS = {"switch": "v", "checkpoint": "s", "rebalance": "D", "shards": "P", "failure": "X"}


def draw(analysis: Analysis) -> Figure:
    """Ranks over seconds since the run's first span."""
    run, phases = analysis.run, analysis.phases
    if phases.empty:
        raise NothingToShow("no rank has begun a phase, so there is no timeline")
    events = run.events()
    start, end = run.start_ns, max(int(phases["end_ns"].max()), int(events["t_ns"].max()) if len(events) else 0)
    shares = dict(sorted(kind_shares(run, start, end, COLUMNS).items()))
    if not shares:
        raise NothingToShow("no spans were recorded, so there is no timeline")
    used = [kind for kind in KIND_COLOURS if any(found[KINDS.index(kind)].any() for found in shares.values())]
    palette = np.array([to_rgb(KIND_COLOURS[kind]) for kind in KINDS] + [(1.0, 1.0, 1.0)])
    height = max(6, 240 // len(shares))
    rows = [np.pad(paint(found, [KINDS.index(k) for k in used], height), ((1, 1), (0, 0)), constant_values=-1)
            for found in shares.values()]  # fmt: skip

    figure = new_figure(analysis, "Timeline by kind of span", 11, 1.6 + max(1.5, rows_height(len(shares))))
    axes = figure.subplots()
    seconds = (end - start) / 1e9
    axes.imshow(palette[np.concatenate(rows)], extent=(0, seconds, len(rows) - 0.5, -0.5), aspect="auto",
                interpolation="nearest")  # fmt: skip
    name_rows(axes, [_name(analysis, rank, lane) for rank, lane in shares])
    axes.set_xlim(0, seconds)
    axes.set_xlabel("time since the first span (s)")
    axes.set_ylabel("rank")
    mark_phases(axes, phase_starts(analysis), phase_names(analysis))
    handles = [Patch(color=KIND_COLOURS[kind], label=kind) for kind in used] + _mark_events(events, axes)
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def _name(analysis: Analysis, rank: int, lane: int) -> str:
    roles = analysis.phases.loc[analysis.phases["rank"] == rank, "role"].unique()
    return f"{rank} {THREADS[lane]}" if lane else " ".join([str(rank), "/".join(roles)])


def _mark_events(events: pd.DataFrame, axes: Axes) -> list[Any]:
    events = events.drop_duplicates(["kind", "text"])
    handles: list[Any] = []
    for kind, mark in MARKS.items():
        at = events.loc[events["kind"] == kind, "t_s"]
        if 0 < len(at) <= MOST_MARKS:
            handles += axes.plot(at, np.full(len(at), -0.5), mark, color=VERMILLION, markeredgecolor="black",
                                 clip_on=False, label=f"{kind} (event)", zorder=5)  # fmt: skip
    return handles


if __name__ == "__main__":
    main(draw)
