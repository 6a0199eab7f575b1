"""The progress of training, from the traces: losses and evaluations on the run's clocks, staleness, rule statistics.

The clocks of a run: `step`: its updates, counted from 1 (rounds in synchronous phases, updates of single workers in
asynchronous ones); `samples`: its cursor; `t_s`: seconds since its first span; `seconds`: training time, without
start-up, evaluations, checkpoints, switches and work that a resumed run lost; `bytes`: exchanged by all ranks in that
time, in messages, as input to collectives, and summed from memory that the ranks of a node share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpctrain.trace.events import Logged, PhaseSwitch, RuleStatistic, chosen
from hpctrain.trace.schema import KIND_CODES

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace import Run
    from hpctrain.trace.files import Rows

Numbers = NDArray[np.float64]
Interval = tuple[int, int]
CLOCKS = ("step", "samples", "t_s", "seconds", "bytes")
PAUSES = (KIND_CODES["evaluate"], KIND_CODES["checkpoint"])
END = (1 << 63) - 1


def losses(run: Run, phases: pd.DataFrame) -> pd.DataFrame:
    """The run's updates in order, one row each: step, samples, t_s, seconds, bytes, loss, phase.

    Steps with the same cursor are one update: a round of all workers, with their losses averaged, weighted by samples.
    If the cursor is unknown, every step is an update, in order of time. The loss is NaN where no worker had a finite
    one. `phases`: see `Analysis.phases`.
    """
    updates = _updates(run)
    t_ns = updates["t_ns"].to_numpy(np.int64)
    attempts = updates["attempt"].to_numpy()
    kept = {attempt: int(t_ns[attempts == attempt].max()) for attempt in np.unique(attempts).tolist()}
    kept[run.attempts[-1]] = END  # work of earlier attempts that the next one repeated does not count
    exchanged, pauses = _scan_spans(run, phases, t_ns, kept)
    updates["bytes"] = np.cumsum(exchanged)[: len(updates)]
    updates["t_s"] = (t_ns - run.start_ns) / 1e9
    updates["seconds"] = _training_seconds(updates, phases, pauses)
    updates["step"] = np.arange(1, len(updates) + 1)
    return updates[[*CLOCKS, "loss", "phase"]]


def evaluations(run: Run, losses: pd.DataFrame) -> pd.DataFrame:
    """The rows of metrics.csv on the clocks of `losses`: columns are the clocks, then epoch, split, loss, metric
    and, of evaluations with several values, metric.NAME.

    An evaluation gets the clock values of the last update before it, so its t_s lies before the evaluation itself.
    Empty, with these columns, if there was no evaluation.
    """
    import pandas as pd

    metrics = run.metrics()
    named = [name for name in metrics.columns if name.startswith("metric.")]
    names = [*CLOCKS, "epoch", "split", "loss", "metric", *named]
    if not {"samples", "epoch", "split", "loss", "metric"} <= set(metrics.columns) or not len(losses):
        return pd.DataFrame({name: pd.Series(dtype="object" if name == "split" else "float64") for name in names})
    last = np.searchsorted(losses["samples"].to_numpy(), metrics["samples"].to_numpy(), side="right") - 1
    for name in ("step", "t_s", "seconds", "bytes"):
        values = losses[name].to_numpy(np.float64)
        metrics[name] = np.where(last >= 0, values[np.maximum(last, 0)], np.nan)
    return metrics[names]


def logged(run: Run) -> pd.DataFrame:
    """What programs logged (`Session.log`), in order: rank, attempt, t_s, step, samples, name, value.

    `step`, `samples`: the steps that the rank had taken, and the run's cursor. Work that a resumed run repeated is left
    out.
    """
    import pandas as pd

    rows = [
        (rank, attempt, (t_ns - run.start_ns) / 1e9, event.step, event.samples, event.name, event.value)
        for rank, attempt, t_ns, event in chosen(run.events(), Logged)
    ]
    frame = pd.DataFrame(rows, columns=["rank", "attempt", "t_s", "step", "samples", "name", "value"])
    steps = run.steps()
    for attempt, step in steps.groupby("attempt")["step"].min().items():  # its first; before it, as many were taken
        frame = frame[(frame["attempt"] >= attempt) | (frame["step"] <= step)]
    return frame.reset_index(drop=True)


def staleness(run: Run) -> pd.DataFrame:
    """A row per gradient in asynchronous phases: phase, rank, step, t_s, staleness_min, staleness_max (in versions,
    over shards). A phase without any stale gradient is assumed to be synchronous and left out."""
    steps = run.steps()[["phase", "rank", "step", "t_s", "staleness_min", "staleness_max"]]
    stale = steps.loc[steps["staleness_max"] > 0, "phase"].unique()
    known = steps["phase"].isin(stale) & (steps["staleness_max"] >= 0)
    return steps[known].sort_values("t_s", kind="stable", ignore_index=True)


def rules(run: Run) -> pd.DataFrame:
    """Rule statistics and ends of phases: t_s, samples, rule, statistic, threshold, unready, fired, text.

    Rows are in order. An event that several ranks recorded is one row, with the time at which the first recorded it.
    `samples`: the run's cursor after that step (-1: unknown); `unready`: why the rule does not fire yet although its
    comparison holds. The end of a phase whose rule computes no statistic is also a row, with NaN as statistic and
    threshold.
    """
    rows = _recorded(run)
    reported = {str(event) for event in rows["event"] if isinstance(event, RuleStatistic) and event.fired}
    repeated = [isinstance(event, PhaseSwitch) and str(event) in reported for event in rows["event"]]
    rows = rows[~np.array(repeated, bool)]
    known = [event if isinstance(event, RuleStatistic) else None for event in rows["event"]]
    rows = rows.assign(
        samples=_samples_after(run, rows["t_s"].to_numpy(np.float64)),
        rule=[event.rule if event else "" for event in known],
        statistic=np.array([event.value if event else np.nan for event in known], np.float64),
        threshold=np.array([event.threshold if event else np.nan for event in known], np.float64),
        unready=[event.unready if event else "" for event in known],
        fired=np.array(
            [isinstance(e, PhaseSwitch) or (isinstance(e, RuleStatistic) and e.fired) for e in rows["event"]], bool
        ),
    )
    columns = ["t_s", "samples", "rule", "statistic", "threshold", "unready", "fired", "text"]
    return rows[columns].reset_index(drop=True)


# -- updates ---------------------------------------------------------------------------------------------------
def _updates(run: Run) -> pd.DataFrame:
    """A row per update: phase, attempt, samples, loss, t_ns (never decreasing)."""
    import pandas as pd

    parts = [_weighed(run.steps(rank)) for rank in run.ranks]
    rows = pd.concat(parts, ignore_index=True).sort_values("t_ns", kind="stable", ignore_index=True)
    if (rows["cursor"] < 0).any():
        rows["cursor"] = rows["samples"].cumsum()
    together = rows.groupby(["cursor", "phase"], sort=True, as_index=False)
    updates = together.agg(
        attempt=("attempt", "max"), weight=("weight", "sum"), weighted=("weighted", "sum"), t_ns=("t_ns", "max")
    )
    updates["loss"] = updates["weighted"] / updates["weight"].where(updates["weight"] > 0)
    updates["t_ns"] = updates["t_ns"].cummax()
    return updates.rename(columns={"cursor": "samples"})[["phase", "attempt", "samples", "loss", "t_ns"]]


def _weighed(steps: pd.DataFrame) -> pd.DataFrame:
    """One rank's input for averaging: finite losses, weighted by their samples."""
    known = np.isfinite(steps["loss"]) & (steps["samples"] > 0)
    few = steps[["phase", "attempt", "cursor", "samples", "t_ns"]].copy()
    few["weight"] = steps["samples"].where(known, 0)
    few["weighted"] = (steps["loss"] * steps["samples"]).where(known, 0.0)
    return few


# -- spans -----------------------------------------------------------------------------------------------------
def _scan_spans(
    run: Run, phases: pd.DataFrame, t_ns: NDArray[np.int64], kept: dict[int, int]
) -> tuple[NDArray[np.int64], dict[int, list[Interval]]]:
    """(bytes exchanged between each update and the one before it, evaluations and checkpoints of each attempt). `kept`:
    the last moment of each attempt that counts."""
    pauses = {key: _whole(np.concatenate(parts)) for key, parts in _pausing(run).items()}
    exchanged = np.zeros(len(t_ns) + 1, np.int64)
    serving, begun = _serving(phases), phases.groupby("attempt")["start_ns"].min().to_dict()
    for rank, attempt, block in run.blocks("spans"):
        moved = block[_exchanges(block, serving.get((attempt, rank), []))]
        moved = moved[moved["start_ns"] >= begun.get(attempt, 0)]  # earlier messages measured the links
        moved = moved[moved["end_ns"] <= kept.get(attempt, END)]
        moved = moved[~_within(moved["start_ns"], pauses.get((attempt, rank), []))]
        place = np.searchsorted(t_ns, moved["end_ns"])
        exchanged += np.bincount(place, moved["bytes"], len(exchanged)).astype(np.int64)
    by_attempt: dict[int, list[Interval]] = {}
    for (attempt, _), found in pauses.items():
        by_attempt.setdefault(attempt, []).extend(found)
    return exchanged, {attempt: _merged(sorted(found)) for attempt, found in by_attempt.items()}


def _pausing(run: Run) -> dict[tuple[int, int], list[Rows]]:
    """The spans of evaluations and checkpoints, by (attempt, rank)."""
    pieces: dict[tuple[int, int], list[Rows]] = {}
    for rank, attempt, block in run.blocks("spans"):
        paused = (block["lane"] == 0) & np.isin(block["kind"], PAUSES)
        pieces.setdefault((attempt, rank), []).append(block[paused])
    return pieces


def _within(moments: NDArray[np.int64], intervals: list[Interval]) -> NDArray[np.bool_]:
    """Mask of the moments that lie in one of the intervals, which are sorted."""
    if not intervals:
        return np.zeros(len(moments), bool)
    starts, ends = np.array(intervals).T
    place = np.searchsorted(starts, moments, side="right") - 1
    inside: NDArray[np.bool_] = (place >= 0) & (moments < ends[np.maximum(place, 0)])
    return inside


def _exchanges(spans: Rows, serving: list[Interval]) -> NDArray[np.bool_]:
    """Mask of the spans that carry bytes from rank to rank. A server's sums do not: their input was sent to it."""
    reduces = spans["kind"] == KIND_CODES["reduce"]
    local = reduces & (spans["id"] < 0) & (spans["lane"] == 1)
    for start, end in serving:
        local |= reduces & (spans["id"] < 0) & (spans["start_ns"] >= start) & (spans["start_ns"] < end)
    gathers = (spans["kind"] == KIND_CODES["recv"]) & (spans["peer"] < 0)
    return (spans["bytes"] > 0) & ((spans["kind"] == KIND_CODES["send"]) | reduces | gathers) & ~local


def _serving(phases: pd.DataFrame) -> dict[tuple[int, int], list[Interval]]:
    """The intervals in which each (attempt, rank) was a server."""
    found: dict[tuple[int, int], list[Interval]] = {}
    servers = phases.loc[phases["role"] == "server", ["attempt", "rank", "start_ns", "end_ns"]]
    for attempt, rank, start, end in servers.to_numpy(np.int64).tolist():
        found.setdefault((attempt, rank), []).append((start, end))
    return found


def _whole(pieces: Rows) -> list[Interval]:
    """Join the pieces of cut spans: from the start of the first piece to the end of the last."""
    pieces = pieces[np.argsort(pieces["start_ns"], kind="stable")]
    first = np.flatnonzero(pieces["piece"] == 0)
    last = np.append(first[1:], len(pieces))[: len(first)] - 1
    return list(zip(pieces["start_ns"][first].tolist(), pieces["end_ns"][last].tolist(), strict=True))


def _merged(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _training_seconds(updates: pd.DataFrame, phases: pd.DataFrame, pauses: dict[int, list[Interval]]) -> Numbers:
    """Training seconds at each update. Work that the next attempt repeated does not count."""
    seconds, before = np.zeros(len(updates)), 0.0
    attempts, t_ns = updates["attempt"].to_numpy(), updates["t_ns"].to_numpy(np.int64)
    edges = phases.groupby(["attempt", "phase"], as_index=False).agg(start=("start_ns", "min"), end=("end_ns", "max"))
    for attempt in np.unique(attempts).tolist():
        mine = attempts == attempt
        trained = np.zeros(int(mine.sum()), np.int64)
        bounds = edges.loc[edges["attempt"] == attempt, ["start", "end"]].to_numpy(np.int64).tolist()
        whole = (int(t_ns[mine][0]), int(t_ns[mine][-1]))  # used if no phase is known
        for start, end in _merged(sorted(map(tuple, bounds)) or [whole]):
            trained += _until(t_ns[mine], start, end)
            for pause, over in pauses.get(attempt, []):
                if pause < end and over > start:
                    trained -= _until(t_ns[mine], max(pause, start), min(over, end))
        seconds[mine] = before + trained / 1e9
        before = float(seconds[mine][-1])
    return seconds


def _until(t: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    """How much of the interval from start to end has passed at each `t`."""
    return np.clip(t, start, end) - start


# -- rules -----------------------------------------------------------------------------------------------------
def _recorded(run: Run) -> pd.DataFrame:
    """Rule events and ends of phases, once each, without those that a resumed run rolled back: t_s, kind, text,
    event."""
    events = run.events()
    events = events[events["kind"].isin([RuleStatistic.kind, PhaseSwitch.kind])]
    if len(run.attempts) > 1:
        last = run.steps().groupby("attempt")["t_s"].max()
        last[run.attempts[-1]] = np.inf
        events = events[events["t_s"] <= events["attempt"].map(last)]
    alike = ["attempt", "kind", "text"]
    events = events.assign(number=events.groupby(["rank", *alike]).cumcount())
    once = events.drop_duplicates([*alike, "number"])
    return once.sort_values(["t_s", "kind"], kind="stable", ignore_index=True)[["t_s", "kind", "text", "event"]]


def _samples_after(run: Run, t_s: Numbers) -> NDArray[np.int64]:
    """The cursor after the first step that ended at or after each of `t_s`; -1: unknown."""
    steps = run.steps()[["t_s", "cursor"]].sort_values("t_s", kind="stable")
    if steps.empty:
        return np.full(len(t_s), -1)
    after = np.searchsorted(steps["t_s"].to_numpy(), t_s)
    return steps["cursor"].to_numpy(np.int64)[np.minimum(after, len(steps) - 1)]
