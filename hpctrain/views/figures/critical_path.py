"""How often each rank was the last that a step waited for: python analysis/critical_path.py RUN -o critical_path.png

The share of synchronous steps in which a rank was the last to reach the exchange, and so set the step's length. Equal
ranks are last equally often: the dashed line. A rank far above it slows all others down.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import look, mark_share, new_figure, phase_names, shown_phases

MOST = 6  # phases


def draw(analysis: Analysis) -> Figure:
    """Bars per rank (%), in one group per phase."""
    path = analysis.critical_path
    if path.empty or path["rank"].nunique() < 2 or not path["steps"].sum():
        raise NothingToShow("no synchronous step had several workers, so no rank arrived last")
    phases, fewer = shown_phases(analysis, path["phase"], MOST)
    ranks = sorted(path.loc[path["phase"].isin(phases), "rank"].unique())
    inches = float(np.clip(3 + 0.35 * len(ranks), 7, 14))
    figure = new_figure(analysis, f"Last to arrive in synchronous steps{fewer}", inches, 3.5)
    axes, names = figure.subplots(), phase_names(analysis)
    width = 0.8 / len(phases)
    for i, phase in enumerate(phases):
        share = path[path["phase"] == phase].set_index("rank")["share"].reindex(ranks)
        place = np.arange(len(ranks)) + width * (i - (len(phases) - 1) / 2)
        axes.bar(place, 100 * share, width, color=look(i)["color"], label=names.get(phase, f"phase {phase}"))
        mark_share(axes, 100 / int(share.notna().sum()), look(i)["color"])
    every = max(1, len(ranks) // 32)
    axes.set_xticks(range(0, len(ranks), every), [str(rank) for rank in ranks[::every]])
    axes.set_xlim(-0.6, len(ranks) - 0.4)
    axes.set_ylim(0, None)
    axes.set_xlabel("rank")
    axes.set_ylabel("steps in which it was last (%)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


if __name__ == "__main__":
    main(draw)
