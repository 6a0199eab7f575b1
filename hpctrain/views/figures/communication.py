"""Bytes by sender and receiver, and the bandwidth achieved: python analysis/communication.py RUN -o communication.png

Left, what each rank (rows) sent to each rank (columns); "all" is what it sent through collectives and through
memory that the node's ranks share. Right, a point per pair: the mean size of its messages, and the bandwidth at which
they arrived. The lines are the bandwidths of the links as measured when the run began: one message of that size at a
time.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.analysis.waiting import check_matrix
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import BLUE, VERMILLION, in_unit, legend, new_figure, short


def draw(analysis: Analysis) -> Figure:
    """Matrix of bytes by peer, and bandwidth (MB/s) against message size (B)."""
    traffic = analysis.traffic
    if traffic.empty or not traffic["bytes"].sum() > 0:
        raise NothingToShow("no rank sent anything")
    ranks = analysis.run.size
    check_matrix(ranks)
    size = float(np.clip(2.5 + 0.3 * ranks, 4.0, 8.0))
    pairs, links = traffic[(traffic["destination"] >= 0) & (traffic["bytes_per_s"] > 0)], analysis.links
    if pairs.empty and links.empty:  # no messages were timed and no links measured
        figure = new_figure(analysis, "Communication", size + 2, size)
        _draw_matrix(figure.subplots(), traffic, ranks)
        return figure
    figure = new_figure(analysis, "Communication", size + 6.5, size)
    left, right = figure.subplots(1, 2, width_ratios=[size, 5.0])
    _draw_matrix(left, traffic, ranks)
    _draw_bandwidth(right, pairs, links)
    return figure


def _draw_matrix(axes: Axes, traffic: pd.DataFrame, ranks: int) -> None:
    cells = np.full((ranks, ranks + 1), np.nan)  # last column: operations without a single receiver
    cells[traffic["source"], traffic["destination"]] = traffic["bytes"].where(traffic["bytes"] > 0)
    factor, unit = in_unit(cells)
    wide = np.nanmax(cells) > 100 * np.nanmin(cells)
    image = axes.imshow(cells * factor, cmap="Blues", **({"norm": LogNorm()} if wide else {"vmin": 0}))
    every = max(1, ranks // 16)
    axes.set_xticks([*range(0, ranks, every), ranks], [*map(str, range(0, ranks, every)), "all"], fontsize=8)
    axes.set_yticks(range(0, ranks, every))
    axes.tick_params(labelsize=8)
    if ranks <= 8:
        for (row, column), value in np.ndenumerate(cells * factor):
            if np.isfinite(value):
                box = {"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.7}
                axes.text(column, row, short(value), ha="center", va="center", fontsize=8, bbox=box)
    axes.set_ylabel("rank that sent")
    axes.set_xlabel("to rank")
    axes.figure.colorbar(image, ax=axes, label=f"sent ({unit})", shrink=0.8)


def _draw_bandwidth(axes: Axes, pairs: pd.DataFrame, links: pd.DataFrame) -> None:
    known = {(row.rank, row.peer): row.same_node for row in links.itertuples()}
    near = np.array([known.get((row.source, row.destination), True) for row in pairs.itertuples()], bool)
    sizes = np.logspace(2, 8, 60)
    for same, colour, where in ((True, BLUE, "same node"), (False, VERMILLION, "between nodes")):
        some = pairs[near == same]
        if len(some):
            axes.plot(some["bytes"] / some["messages"], some["bytes_per_s"] / 1e6, "o", color=colour, alpha=0.7,
                      label=f"achieved, {where}")  # fmt: skip
        of = links[links["same_node"] == same]
        if len(of):
            middle = of[["latency_s", "bytes_per_s"]].median()
            rate = sizes / (middle["latency_s"] + sizes / middle["bytes_per_s"])
            axes.plot(sizes, rate / 1e6, color=colour, label=f"measured, {where}")
    axes.set(xscale="log", yscale="log", xlabel="mean size of a message (B)", ylabel="bandwidth (MB/s)")
    low, high = np.log10(axes.get_ylim())
    axes.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
    if links.empty:
        axes.set_title("the links were not measured when the run began", fontsize=9)
    legend(axes)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main(draw)
