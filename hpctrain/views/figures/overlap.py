"""How much communication was hidden behind computation: python analysis/overlap.py RUN -o overlap.png

A bar per rank: the time during which it had messages or collectives in flight. Green is the part in which it was
computing meanwhile: communication that cost nothing. Red is the part in which it could only wait. The number is the
green share.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    GREEN,
    VERMILLION,
    name_rows,
    new_figure,
    phase_names,
    rows_height,
    shown_phases,
)

MOST = 6  # phases: a panel each


def draw(analysis: Analysis) -> Figure:
    """Seconds in flight by rank, divided into hidden and blocked; a panel per phase."""
    overlap = analysis.overlap[analysis.overlap["in_flight_s"] > 0]
    if overlap.empty:
        raise NothingToShow("nothing was in flight between two ranks")
    phases, fewer = shown_phases(analysis, overlap["phase"], MOST)
    names, overlap = phase_names(analysis), overlap[overlap["phase"].isin(phases)]
    rows = int(overlap.groupby("phase").size().max())
    about = f"Overlap of communication and computation{fewer}"
    figure = new_figure(analysis, about, 4.5 + 3.5 * len(phases), 1.6 + rows_height(rows))
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        mine = overlap[overlap["phase"] == phase].sort_values("rank")
        blocked = np.minimum(mine["blocked_s"], mine["in_flight_s"])
        hidden = mine["in_flight_s"] - blocked
        place = range(len(mine))
        first = axes.barh(place, hidden, color=GREEN, label="hidden behind computation")
        second = axes.barh(place, blocked, left=hidden, color=VERMILLION, label="blocked")
        axes.bar_label(second, [f"{share:.0%}" for share in hidden / mine["in_flight_s"]], fontsize=8, padding=3)
        name_rows(axes, [str(rank) for rank in mine["rank"]], least=4)
        axes.margins(x=0.12)
        axes.set_title(names.get(phase, f"phase {phase}"), fontsize=9)
        axes.set_ylabel("rank")
        axes.set_xlabel("time with communication in flight (s)")
    figure.legend(handles=[first, second], loc="outside lower center", ncols=2, fontsize=8)
    return figure


if __name__ == "__main__":
    main(draw)
