"""What the rule that ends a phase computed: python analysis/switching.py RUN -o switching.png

Above, the rule's statistic after every window of losses, with its threshold; hollow points are those where it could
not fire yet (the event's text says why). The star is where it fired. Below, the training loss that it received.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.views.figures import NothingToShow
from hpctrain.views.figures.script import main
from hpctrain.views.figures.style import (
    BLUE,
    SKY,
    VERMILLION,
    first_of_phases,
    legend,
    look,
    mark_phases,
    new_figure,
    smoothed,
)


def draw(analysis: Analysis) -> Figure:
    """The statistic and the loss over samples."""
    rules, losses = analysis.rules.dropna(subset=["statistic"]), analysis.convergence
    if rules.empty:
        raise NothingToShow("no phase of this run is ended by a rule that computes a statistic")
    figure = new_figure(analysis, "What ended the phases", 9, 5.5)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    for i, (name, mine) in enumerate(rules.groupby("rule", sort=False)):
        colour = look(i)["color"]
        upper.plot(mine["samples"], mine["statistic"], "-o", color=colour, linewidth=1.0, markersize=4, label=name)
        early = mine[mine["unready"] != ""]
        if len(early):
            upper.plot(early["samples"], early["statistic"], "o", markerfacecolor="white", color=colour, markersize=4,
                       label="may not fire yet")  # fmt: skip
        upper.plot(mine["samples"], mine["threshold"], "--", color=colour, label="threshold")
    fired = rules[rules["fired"]]
    upper.plot(fired["samples"], fired["statistic"], "*", color=VERMILLION, markersize=14, zorder=5, label="fired")
    positive = rules.loc[rules["statistic"] > 0, "statistic"]
    if len(positive) == len(rules) and positive.max() > 20 * positive.min():
        upper.set_yscale("log")
    upper.set_ylabel(f"statistic of {', '.join(rules['rule'].unique())} (dimensionless)")
    legend(upper)
    lower.plot(losses["samples"], losses["loss"], color=SKY, linewidth=0.5, alpha=0.6)
    lower.plot(losses["samples"], smoothed(losses), color=BLUE, linewidth=1.5)
    lower.set_ylabel("training loss")
    lower.set_xlabel("samples")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        mark_phases(axes, first_of_phases(losses, "samples"))
    return figure


if __name__ == "__main__":
    main(draw)
