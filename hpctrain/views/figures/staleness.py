"""How stale gradients were: python analysis/staleness.py RUN -o staleness.png

Staleness is the number of updates between reading the parameters and applying the gradient computed on them. Left, how
often each value occurred; right, over time, running means by worker. A slow worker has the stalest gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import BLUE, MANY, from_zero, legend, look, new_figure, rank_lines

MOST_BARS = 40


def draw(analysis: Analysis) -> Figure:
    """Staleness in versions: histogram (% of gradients) and course over seconds."""
    stale = analysis.staleness
    if stale.empty:
        raise NothingToShow("no gradient was stale: no phase is asynchronous")
    figure = new_figure(analysis, "Staleness", 11, 4)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    values, ranks = stale["staleness_max"].to_numpy(), stale["rank"].to_numpy()
    step = max(1, -(-int(values.max() + 1) // MOST_BARS))
    edges = np.arange(0, values.max() + 1 + step, step) - 0.5
    base = np.zeros(len(edges) - 1)
    for i, rank in enumerate(np.unique(ranks) if len(np.unique(ranks)) <= MANY else [None]):
        chosen = values if rank is None else values[ranks == rank]
        share = 100 * np.histogram(chosen, edges)[0] / len(values)
        colour = BLUE if rank is None else look(i)["color"]
        left.bar(edges[:-1] + step / 2, share, 0.9 * step, bottom=base, color=colour)
        base += share
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("staleness (updates)")
    left.set_ylabel("share of gradients (%)")
    left.set_title(f"mean {values.mean():.2f}, 95 % at most {np.quantile(values, 0.95):.0f}", fontsize=9)
    courses: dict[Any, Any] = {}
    for rank, mine in stale.groupby("rank"):
        window = max(1, len(mine) // 20)
        smooth = mine["staleness_max"].rolling(window, min_periods=1).mean()
        courses[rank] = (mine["t_s"].to_numpy(), smooth.to_numpy())
    rank_lines(right, courses, "highest")
    right.set_xlabel("time since the first span (s)")
    right.set_ylabel("staleness (updates)")
    from_zero(right)
    right.grid(alpha=0.3)
    legend(right)
    return figure


if __name__ == "__main__":
    main(draw)
