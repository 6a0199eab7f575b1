"""Loss and throughput of every worker over time: python analysis/loss.py RUN -o figure.png"""

import argparse
import sys

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hpctrain.errors import HpctrainError
from hpctrain.trace import Run, open_run

# Okabe and Ito's colours, which colour-blind people can tell apart; line styles tell ranks of one colour
# apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
STYLES = ["-", "--", ":", "-."]


def throughput(steps: pd.DataFrame, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Samples per second in `bins` equal stretches of the time (seconds, their middles) that `steps`
    cover."""
    rates, edges = np.histogram(steps["t_s"], bins, weights=steps["samples"])
    return (edges[1:] + edges[:-1]) / 2, rates / np.diff(edges)


def draw(run: Run) -> Figure:
    """Two panels over seconds: smoothed loss above, samples per second below, one line per worker."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    steps = run.steps()
    window = max(1, len(steps) // max(1, steps["rank"].nunique()) // 100)
    for i, (rank, mine) in enumerate(steps.groupby("rank")):
        look = {"color": COLOURS[i % 7], "linestyle": STYLES[i // 7 % 4], "linewidth": 1.3}
        upper.plot(mine["t_s"], mine["loss"].rolling(window, min_periods=1).mean(), label=f"rank {rank}", **look)
        lower.plot(*throughput(mine, max(2, min(60, len(mine) // 10))), marker=".", **look)
    upper.set_ylabel(f"training loss (mean of {window} steps)" if window > 1 else "training loss")
    lower.set_ylabel("throughput (samples/s)")
    lower.set_xlabel("time since the first span (s)")
    lower.set_ylim(bottom=0)
    if len(steps):
        upper.legend(ncols=max(1, steps["rank"].nunique() // 8), loc="upper right")
    figure.suptitle("\n".join([run.folder.resolve().name, *(f"note: {note}" for note in run.notes[:4])]), fontsize=9)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder, runs/NAME-TIMESTAMP")
    parser.add_argument("-o", "--output", default="loss.png", help="the picture to write (.png, .pdf, .svg)")
    arguments = parser.parse_args()
    try:
        draw(open_run(arguments.run)).savefig(arguments.output, dpi=150)
    except HpctrainError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
