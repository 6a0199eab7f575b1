"""Where each rank's phases begin and end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.trace.events import PhaseEntered, chosen
from hpctrain.trace.schema import KIND_CODES

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace.reader import Run

COMPUTING = ("data", "forward", "backward")
COLUMNS = ["attempt", "phase", "strategy", "rank", "role", "start_ns", "end_ns"]
Key = tuple[int, int, int]  # attempt, phase, rank


def find_phases(run: Run) -> pd.DataFrame:
    """Each rank's training in each phase: from its first batch to the end of its last step.

    A server's training time is that of the phase's workers. Work before it (distributing state) and after it (the last
    evaluation, writing the model) does not count as training. Phases are found by PhaseEntered events; a run without
    them is one phase with an unknown strategy.
    """
    import pandas as pd

    entered = _entered(run)
    firsts, lasts = _firsts(run, entered), _lasts(run)
    rows, trained = [], dict[tuple[int, int], tuple[int, int]]()
    for (attempt, phase, rank), (strategy, role, at) in entered.items():
        start, end = firsts.get((attempt, phase, rank), at), lasts.get((attempt, phase, rank), at)
        if role == "worker" and end > start:
            rows.append((attempt, phase, strategy, rank, role, start, end))
            low, high = trained.get((attempt, phase), (start, end))
            trained[attempt, phase] = min(low, start), max(high, end)
    for (attempt, phase, rank), (strategy, role, _) in entered.items():
        if role != "worker" and (attempt, phase) in trained:
            rows.append((attempt, phase, strategy, rank, role, *trained[attempt, phase]))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["attempt", "phase", "rank"], ignore_index=True)


def longest(phases: pd.DataFrame, most: int) -> list[int]:
    """The `most` longest phases of `Analysis.phases`, in order: for views with limited room."""
    took = (phases["end_ns"] - phases["start_ns"]).groupby(phases["phase"]).max()
    return sorted(took.nlargest(most).index.tolist())


def _entered(run: Run) -> dict[Key, tuple[str, str, int]]:
    """(strategy, role, time) of each rank's entry into each phase."""
    found: dict[Key, tuple[str, str, int]] = {}
    for rank, attempt, t_ns, entry in chosen(run.events(), PhaseEntered):
        found[attempt, entry.phase, rank] = entry.strategy, entry.role, t_ns
    known = {(attempt, rank) for attempt, _, rank in found}
    for rank, attempt, block in run.blocks("steps"):
        if (attempt, rank) not in known:
            found.setdefault((attempt, 0, rank), ("unknown", "worker", int(block["t_ns"].min()) - 1))
    return found


def _firsts(run: Run, entered: dict[Key, tuple[str, str, int]]) -> dict[Key, int]:
    """Start of the first computation after each worker's entry into a phase."""
    codes, found = [KIND_CODES[kind] for kind in COMPUTING], {}
    for rank in run.ranks:
        mine = sorted((at, attempt, phase) for (attempt, phase, of), (_, role, at) in entered.items()
                      if of == rank and role == "worker")  # fmt: skip
        for _, attempt, block in run.blocks("spans", rank):
            if not any(of == attempt for _, of, _ in mine):
                continue
            starts = np.sort(block["start_ns"][np.isin(block["kind"], codes)])
            for entry in [entry for entry in mine if entry[1] == attempt and len(starts) and starts[-1] >= entry[0]]:
                mine.remove(entry)
                found[attempt, entry[2], rank] = int(starts[np.searchsorted(starts, entry[0])])
    return found


def _lasts(run: Run) -> dict[Key, int]:
    """End of the last step of each (attempt, phase, rank)."""
    found: dict[Key, int] = {}
    for rank, attempt, block in run.blocks("steps"):
        for phase in np.unique(block["phase"]).tolist():
            last = int(block["t_ns"][block["phase"] == phase].max())
            key = (attempt, phase, rank)
            found[key] = max(found.get(key, last), last)
    return found
