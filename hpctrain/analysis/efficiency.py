"""Time by kind of span, and the POP model's efficiencies (docs/metrics.md has the formulas)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.trace.schema import KINDS, Kind

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis.course import Course

USEFUL = (Kind.DATA, Kind.FORWARD, Kind.BACKWARD, Kind.ENCODE, Kind.DECODE, Kind.UPDATE)


def sum_by_phase(course: Course, phases: pd.DataFrame) -> pd.DataFrame:
    """A row per phase, rank and lane: columns phase, strategy, rank, lane, role, seconds of every span kind, useful_s,
    communication_s, paused_s, total_s.

    total_s: from the first batch to the end of the last step, without evaluations, checkpoints and switches
    (paused_s), summed over attempts. For servers it covers the time from their workers' first batch to last step.
    """
    import pandas as pd

    spans, keys = course.training, ["phase", "rank", "lane"]
    took = (spans["end_ns"] - spans["start_ns"]) / 1e9 / course.share
    inside = spans["communication"].astype(bool)
    by_kind = took.groupby([spans[key] for key in (*keys, "kind")]).sum().unstack("kind")
    by_kind = by_kind.reindex(columns=range(1, len(KINDS) + 1), fill_value=0.0)
    by_kind.columns = pd.Index(KINDS)
    by_kind["communication_s"] = took[inside].groupby([spans[key] for key in keys]).sum()
    useful = spans["kind"].isin(USEFUL) | (spans["kind"] == Kind.REDUCE) & ~inside
    by_kind["useful_s"] = took[useful].groupby([spans[key] for key in keys]).sum()
    frame = by_kind.fillna(0.0).reset_index()
    facts = _facts(phases, course.pauses)
    merged = facts.merge(frame, on=["phase", "rank"], how="left").fillna({"lane": 0}).fillna(0.0)
    merged["lane"] = merged["lane"].astype(int)
    sums = ["useful_s", "communication_s", "paused_s", "total_s"]
    merged = merged[["phase", "strategy", "rank", "lane", "role", *KINDS, *sums]]
    return merged.sort_values(["phase", "rank", "lane"], ignore_index=True)


def _facts(phases: pd.DataFrame, pauses: pd.DataFrame) -> pd.DataFrame:
    """Columns phase, rank, strategy, role, paused_s, total_s, over all attempts."""
    timed = phases.assign(whole=(phases["end_ns"] - phases["start_ns"]) / 1e9)
    whole = timed.groupby(["phase", "rank"], as_index=False).agg(
        strategy=("strategy", "last"), role=("role", "last"), whole=("whole", "sum")
    )
    paused = (pauses["end_ns"] - pauses["start_ns"]).div(1e9).groupby([pauses["phase"], pauses["rank"]]).sum()
    whole["paused_s"] = [float(paused.get(key, 0.0)) for key in zip(whole["phase"], whole["rank"], strict=True)]
    whole["total_s"] = whole["whole"] - whole["paused_s"]
    return whole.drop(columns="whole")


def pop(times: pd.DataFrame) -> pd.DataFrame:
    """A row per phase, over its workers: columns phase, strategy, workers, seconds, parallel_efficiency, load_balance,
    communication_efficiency.

    With U the useful time of each worker and T the phase's time (that of the slowest worker): load balance is
    mean(U) / max(U), communication efficiency max(U) / T, and parallel efficiency their product, mean(U) / T (POP
    Centre of Excellence, Standard Metrics for Performance Analysis; Wagner et al. 2017). The split of communication
    efficiency into serialisation and transfer needs a replay on an ideal network and is left out.
    """
    import pandas as pd

    rows = []
    workers = times[(times["role"] == "worker") & (times["lane"] == 0) & (times["total_s"] > 0)]
    for (phase, strategy), own in workers.groupby(["phase", "strategy"]):
        useful, seconds = own["useful_s"].to_numpy(), float(own["total_s"].max())
        balance = float(useful.mean() / useful.max()) if useful.max() > 0 else np.nan
        communication = float(useful.max() / seconds)
        rows.append((phase, strategy, len(own), seconds, balance * communication, balance, communication))
    columns = ["phase", "strategy", "workers", "seconds", "parallel_efficiency", "load_balance",
               "communication_efficiency"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def computation_scaling(baseline: float, seconds: float) -> float:
    """POP's computation scaling: the baseline run's useful seconds per sample / this run's."""
    return baseline / seconds if seconds > 0 else np.nan
