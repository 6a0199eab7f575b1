"""Which rank waited for which, and what that rank was doing: python analysis/waiting.py RUN -o waiting.png

Left, the seconds that each rank (rows) waited for each rank (columns): for the one at the end of the chain, if that one
was waiting itself. A dark column is a rank that holds up others. Right, what the ranks that were waited for were doing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import GREY, KIND_COLOURS, legend, name_rows, new_figure, short

MOST = 16  # ranks in the right panel; also the most for which the left panel shows numbers
SMALL = 0.005  # ranks that were waited for less than this share of all waiting are left out on the right


def draw(analysis: Analysis) -> Figure:
    """Matrix of seconds that ranks waited for each other, and what every rank waited for was doing meanwhile (s)."""
    waits, matrix = analysis.waits, analysis.waiting_matrix()
    if waits.empty or not waits["seconds"].sum() > 0:
        raise NothingToShow("no rank waited for another")
    size = float(np.clip(2.5 + 0.3 * len(matrix), 4.0, 8.0))
    figure = new_figure(analysis, "Waiting", size + 6.5, size)
    left, right = figure.subplots(1, 2, width_ratios=[size, 5.0])
    _draw_matrix(left, matrix)
    _draw_doing(right, waits)
    return figure


def _draw_matrix(axes: Axes, matrix: pd.DataFrame) -> None:
    cells = matrix.to_numpy(np.float64)
    image = axes.imshow(cells, cmap="Blues", vmin=0)
    names = [_name(rank) for rank in matrix.columns]
    every = max(1, len(names) // MOST)
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=8)
    axes.set_yticks(range(0, len(matrix), every), list(matrix.index)[::every], fontsize=8)
    if len(names) <= MOST:
        for (row, column), value in np.ndenumerate(cells):
            if value > 0:
                colour = "white" if value > 0.6 * cells.max() else "black"
                axes.text(column, row, short(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_ylabel("rank that waited")
    axes.set_xlabel("rank waited for")
    axes.figure.colorbar(image, ax=axes, label="time waited (s)", shrink=0.8)


def _draw_doing(axes: Axes, waits: pd.DataFrame) -> None:
    table = waits.pivot_table(index="root", columns="doing", values="seconds", aggfunc="sum", observed=True).fillna(0.0)
    whole = table.sum(axis=1).sort_values(ascending=False)
    worst = table.loc[whole.index[whole > SMALL * whole.sum()][:MOST]]
    left = np.zeros(len(worst))
    for doing in worst.sum().sort_values(ascending=False).index:
        colour, hatch = KIND_COLOURS.get(doing, GREY), None if doing in KIND_COLOURS else "//"
        axes.barh(range(len(worst)), worst[doing], left=left, label=doing or "not known", color=colour, hatch=hatch,
                  edgecolor="white", linewidth=0)  # fmt: skip
        left += worst[doing].to_numpy()
    name_rows(axes, [_name(rank) for rank in worst.index], least=4)
    axes.set_ylabel("rank waited for" + (f" ({len(worst)} of {len(table)})" if len(table) > len(worst) else ""))
    axes.set_xlabel("time that others waited for it (s)")
    axes.set_title("what it was doing meanwhile", fontsize=9)
    legend(axes)


def _name(rank: object) -> str:
    return "not known" if rank == -1 else str(rank)


if __name__ == "__main__":
    main(draw)
