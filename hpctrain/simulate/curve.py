"""Losses and evaluations of an earlier run, as functions of the samples that it had processed."""

from __future__ import annotations

from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpctrain.analysis import Analysis
from hpctrain.errors import ClusterError
from hpctrain.filenames import JOB
from hpctrain.job import Job
from hpctrain.job.spec import Named
from hpctrain.trace import open_run

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[np.float64]


class Curve:
    """`loss` and `metric` at a cursor. `last`: where the losses end. `metrics`: by part of the data ("validation",
    "test"), pairs of cursors and values. `source`: the run, for messages."""

    def __init__(
        self, samples: Numbers, losses: Numbers, metrics: dict[str, tuple[Numbers, Numbers]], source: str
    ) -> None:
        known = np.isfinite(losses)
        ends, found = np.unique(samples[known], return_index=True)
        self.source, self.metrics = source, metrics
        self._ends = np.concatenate([[0.0], ends])
        self._sums = np.concatenate([[0.0], np.cumsum(losses[known][found] * np.diff(self._ends))])

    @classmethod
    def of(cls, folder: Path, job: Job) -> Curve:
        """Of the run in `folder`. Raises ClusterError if it has no losses, or did not train the job's model on its
        data, and TraceError if it is no run."""
        run = open_run(folder)
        _check_alike(run.job, job, folder)
        analysis = Analysis(run)
        samples, losses = (analysis.convergence[name].to_numpy(np.float64) for name in ("samples", "loss"))
        curve = cls(samples, losses, _metrics(analysis.metrics), str(folder))
        if curve.last <= 0:
            raise ClusterError(f"--curve {folder}: that run has no losses (was it simulated without gradients?)")
        return curve

    @property
    def last(self) -> float:
        """The cursor of the last known loss."""
        return float(self._ends[-1])

    def loss(self, low: int, high: int) -> float:
        """The mean over samples `low` to `high`; NaN beyond the last known loss."""
        high = min(high, int(self.last))
        if high <= low:
            return nan
        before, after = np.interp([low, high], self._ends, self._sums)
        return float((after - before) / (high - low))

    def metric(self, part: str, cursor: int, over: bool) -> float:
        """Between two evaluations: in proportion. Outside of all: raises ClusterError, unless the run is `over`: then
        nothing depends on it."""
        samples, values = self.metrics[part]
        if not over and not samples[0] <= cursor <= samples[-1]:
            raise ClusterError(
                f"--curve {self.source}: that run has {part} metrics from sample {samples[0]:,.0f} to "
                f"{samples[-1]:,.0f}, but the job needs one at sample {cursor:,}; "
                + ("train it longer, or this job shorter" if cursor > samples[0] else "evaluate less often")
            )
        return float(np.interp(cursor, samples, values))

    def lacks(self, part: str) -> ClusterError:
        """For a job that needs metrics of a part of the data, where there are none."""
        return ClusterError(
            f"--curve {self.source}: that run has no {part} metrics, by which this job ends a phase or its training; "
            "give a run that has evaluated (train.evaluate_every)"
        )

    def too_short(self, cursor: int, why: str) -> ClusterError:
        """For a loss beyond the last one that something needs: `why`."""
        return ClusterError(
            f"--curve {self.source}: that run has losses up to sample {self.last:,.0f}, and at sample {cursor:,} {why};"
            " give a longer run, or train this job shorter"
        )


def _metrics(rows: pd.DataFrame) -> dict[str, tuple[Numbers, Numbers]]:
    found = {}
    for part, own in rows.groupby("split"):
        own = own[[isfinite(value) for value in own["metric"]]].drop_duplicates("samples").sort_values("samples")
        if len(own):
            found[str(part)] = own["samples"].to_numpy(np.float64), own["metric"].to_numpy(np.float64)
    return found


def _check_alike(earlier: Job | str, job: Job, folder: Path) -> None:
    """Raise ClusterError unless both jobs train the same model on the same data, and measure it alike."""
    if isinstance(earlier, str):
        raise ClusterError(f"--curve {folder}: what that run trained is not known: its {JOB} is not a valid job file")
    for table in ("model", "data", "loss", "metric"):
        old, new = (getattr(each, table) for each in (earlier, job))
        if (old.name, old.options) != (new.name, new.options):
            raise ClusterError(
                f"--curve {folder}: that run has {_words(table, old)}, and this job {_words(table, new)}; give a run "
                "with the same model, data, loss and metric"
            )


def _words(table: str, spec: Named) -> str:
    options = "".join(f", {key} = {value!r}" for key, value in spec.options.items())
    return f"{table}.name = {spec.name!r}{options}"
