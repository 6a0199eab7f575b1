"""What the ranks' devices did, beside what their hosts did in the spans of the same kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace.reader import Run

KEYS = ["phase", "strategy", "rank"]
COLUMNS = [*KEYS, "kind", "steps", "device_s", "host_s", "device_ms_per_step", "host_ms_per_step", "error_us"]


def device_times(run: Run, phases: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """A row per phase, rank and kind of span that was timed on a device; none for a run on CPUs.

    Columns phase, strategy, rank, kind, steps, device_s (on the device, see `trace.device`), host_s (of the host's
    spans, from `times`), both per step, error_us (the median error of where the device's times lie on the host's
    clock). Evaluations are not timed on the device, and are not part of either.
    """
    import pandas as pd

    rows = run.device()
    if not len(rows) or not len(phases):
        return pd.DataFrame(columns=COLUMNS)
    rows["phase"] = _phases(rows, phases)
    rows = rows[rows["phase"] >= 0].assign(took=(rows["end_ns"] - rows["start_ns"]) / 1e9)
    grouped = rows.groupby(["phase", "rank", "kind"], observed=True)
    found = grouped.agg(steps=("step", "nunique"), device_s=("took", "sum"), error=("error_ns", "median")).reset_index()
    found["kind"] = found["kind"].astype(str)
    host = times[times["lane"] == 0].melt([*KEYS], list(found["kind"].unique()), "kind", "host_s")
    found = found.merge(host, on=["phase", "rank", "kind"], how="left")
    for name in ("device", "host"):
        found[f"{name}_ms_per_step"] = 1e3 * found[f"{name}_s"] / found["steps"]
    found["error_us"] = found["error"] / 1e3
    return found[COLUMNS]


def _phases(rows: pd.DataFrame, phases: pd.DataFrame) -> np.ndarray:
    """The phase in which each row began, -1 if the rank was in none. A device may finish a phase after its host."""
    found = np.full(len(rows), -1, np.int64)
    for (attempt, rank), own in phases.groupby(["attempt", "rank"]):
        here = np.flatnonzero((rows["attempt"] == attempt) & (rows["rank"] == rank))
        starts = own["start_ns"].to_numpy()
        place = np.searchsorted(starts, rows["start_ns"].to_numpy()[here], side="right") - 1
        found[here] = own["phase"].to_numpy()[np.maximum(place, 0)]
    return found
