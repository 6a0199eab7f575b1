"""Figures of a run, one file each: `draw(analysis)` there gives a matplotlib Figure.

`analysis/NAME.py` at the top of the repository are links to them, to run and to copy; the report shows the same.
"""

from __future__ import annotations

from hpctrain.errors import HpctrainError

# In the order of the report.
FIGURES = (
    "timeline",
    "efficiency",
    "waiting",
    "critical_path",
    "communication",
    "overlap",
    "throughput",
    "loss",
    "logged",
    "staleness",
    "switching",
    "resources",
)


class NothingToShow(HpctrainError):
    """Raised if the run has nothing for the figure to show; the message says why."""
