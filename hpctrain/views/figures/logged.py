"""What the program logged: python analysis/logged.py RUN -o logged.png

A panel for each name that `Session.log` was called with, against the run's samples. The line is the mean of what ranks
logged at the same place, the band reaches from the smallest to the largest value.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.text import escaped
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import BLUE, SKY, literal, new_figure

COLUMNS, MOST = 3, 24  # panels in a row, and in all


def draw(analysis: Analysis) -> Figure:
    """The logged values, in the order in which their names first occurred."""
    logged = analysis.logged
    if logged.empty:
        raise NothingToShow("nothing was logged: the program did not call log()")
    names = list(dict.fromkeys(logged["name"]))[:MOST]
    rows = -(-len(names) // COLUMNS)
    figure = new_figure(analysis, "Logged values", 11, 1.0 + 2.4 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).flat
    for axes, name in zip(grid, names, strict=False):
        values = logged[logged["name"] == name].groupby("samples")["value"].agg(["mean", "min", "max"])
        axes.fill_between(values.index, values["min"], values["max"], color=SKY, alpha=0.4, linewidth=0)
        axes.plot(values.index, values["mean"], "-" if len(values) > 1 else "D", color=BLUE, linewidth=1.2)
        axes.set_title(literal(escaped(name)), fontsize=9)
        axes.set_xlabel("samples")
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(names) :]:
        axes.remove()
    return figure


if __name__ == "__main__":
    main(draw)
