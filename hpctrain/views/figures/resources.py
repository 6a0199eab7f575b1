"""CPU, memory, network and GPUs over time, by node: python analysis/resources.py RUN -o resources.png

CPU and memory are those of the run's own processes, summed over a node's ranks; 100 % is one core. The network is the
whole node's, without loopback, for all processes. GPUs are those of the ranks, where the driver reports them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.analysis.usage import node_usage
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import from_zero, legend, mark_phases, new_figure, phase_starts, rank_lines

GIB, MB = 1 / 2**30, 1e-6


def draw(analysis: Analysis) -> Figure:
    """A panel per quantity over seconds since the run's first span, with a line per node (GPUs: per rank)."""
    usage = analysis.usage
    if usage.empty:
        raise NothingToShow("resources were not sampled; see trace.resources_seconds")
    nodes, speak = node_usage(usage), usage.dropna(subset=["net_in_bytes_per_s", "net_out_bytes_per_s"])
    panels: list[tuple[str, str, float, pd.DataFrame, str]] = [
        ("cpu_percent", "CPU (% of one core)", 1.0, nodes, "node"),
        ("resident_bytes", "memory (GiB)", GIB, nodes, "node"),
        ("net_in_bytes_per_s", "network in (MB/s)", MB, speak, "node"),
        ("net_out_bytes_per_s", "network out (MB/s)", MB, speak, "node"),
        ("gpu_percent", "GPU busy (%)", 1.0, usage, "rank"),
        ("gpu_memory_bytes", "GPU memory (GiB)", GIB, usage, "rank"),
    ]
    panels = [panel for panel in panels if panel[3][panel[0]].notna().any()]
    rows = -(-len(panels) // 2)
    figure = new_figure(analysis, "Resources", 11, 1.0 + 2.3 * rows)
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axes, (name, label, factor, frame, by) in zip(grid.flat, panels, strict=False):
        _draw_courses(axes, frame.dropna(subset=[name]), name, factor, by)
        axes.set_ylabel(label)
        mark_phases(axes, phase_starts(analysis))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[: len(panels)][-2:]:
        axes.set_xlabel("time since the first span (s)")
        axes.tick_params(labelbottom=True)
    return figure


def _draw_courses(axes: Axes, frame: pd.DataFrame, name: str, factor: float, by: str) -> None:
    groups = frame.groupby(by)
    courses: dict[Any, Any] = {key: (own["t_s"].to_numpy(), own[name].to_numpy() * factor) for key, own in groups}
    rank_lines(axes, courses, "highest", what=by)
    from_zero(axes)
    axes.grid(alpha=0.3)
    legend(axes)


if __name__ == "__main__":
    main(draw)
