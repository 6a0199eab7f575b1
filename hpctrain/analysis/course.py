"""All ranks' spans in one frame, with their phases: the input for times, waits and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.trace.schema import SPANS, Kind, is_communication

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace.reader import Run

Rows = np.ndarray[Any, Any]
PAUSES = (Kind.EVALUATE, Kind.CHECKPOINT, Kind.SWITCH)
MOST = 6_000_000  # spans held in memory
STRETCHES = 64


COLUMNS = ("lane", "step", "kind", "piece", "start_ns", "end_ns", "bytes", "peer", "id")


@dataclass
class Course:
    """The spans of all ranks, or a sample of them.

    `spans`: attempt, phase, rank, lane, step, kind (code), piece, start_ns, end_ns, bytes, peer, id, communication,
    paused; sorted by rank, lane and time. `communication`: see `schema.is_communication`. `paused`: the span lies in an
    evaluation, a checkpoint or a switch of its rank.

    `pauses`: attempt, phase, rank, start_ns, end_ns of the pauses. `share`: the share of the run's spans in `spans`.
    Below 1, they are a sample from equally spaced stretches of time, and sums over them have to be divided by `share`.
    """

    spans: pd.DataFrame
    pauses: pd.DataFrame
    share: float

    @cached_property
    def training(self) -> pd.DataFrame:
        """The spans that are not paused."""
        return self.spans[~self.spans["paused"].astype(bool)].reset_index(drop=True)


def read_course(run: Run, phases: pd.DataFrame, most: int = MOST) -> Course:
    """Read the spans of all phases; at most about `most` of them. If this is a sample, a note is added to the run."""
    import pandas as pd

    share = min(1.0, most / max(1, sum(run.rows("spans").values())))
    if share < 1.0:
        run.notes.append(f"waiting and traffic come from {STRETCHES} stretches with {share:.0%} of the run's spans")
    parts, pauses = [], []
    for attempt, of_attempt in phases.groupby("attempt"):
        stretches = _stretches(of_attempt, share) if share < 1.0 else None
        for rank, own in of_attempt.groupby("rank"):
            key = {"attempt": attempt, "rank": rank}
            rows, breaks = _read(run, int(str(rank)), int(str(attempt)), stretches)
            parts.append(_in_phases(rows, own, breaks).assign(**key))
            pauses.append(_cut(breaks, own).assign(**key))
    empty = pd.DataFrame(columns=["attempt", "phase", "rank", "paused", *COLUMNS], dtype=np.int64)
    spans = pd.concat(parts, ignore_index=True) if parts else empty.assign(communication=False)
    return Course(spans, pd.concat(pauses, ignore_index=True) if pauses else empty, share)


def _stretches(phases: pd.DataFrame, share: float) -> Rows:
    """Bounds of equal stretches of time in these phases: starts at even indices, ends at odd ones."""
    start, end = int(phases["start_ns"].min()), int(phases["end_ns"].max())
    begins = np.linspace(start, end, STRETCHES, endpoint=False)
    width = (end - start) / STRETCHES * share
    return np.stack([begins, begins + width], axis=1).ravel().astype(np.int64)


def _read(run: Run, rank: int, attempt: int, stretches: Rows | None) -> tuple[Rows, Rows]:
    """(spans, only those in `stretches` if given, sorted by lane and time; start and end of every pause)."""
    blocks, pausing = [np.zeros(0, SPANS)], [np.zeros(0, SPANS)]
    for _, of_attempt, block in run.blocks("spans", rank):
        if of_attempt == attempt:
            pausing.append(block[(block["lane"] == 0) & np.isin(block["kind"], PAUSES)])
            if stretches is not None:
                block = block[np.searchsorted(stretches, block["start_ns"], side="right") % 2 == 1]
            blocks.append(block)
    rows = np.concatenate(blocks)
    return rows[np.lexsort((rows["end_ns"], rows["start_ns"], rows["lane"]))], _pauses(np.concatenate(pausing))


def _pauses(own: Rows) -> Rows:
    """(start, end) of evaluations, checkpoints and switches, including everything inside them."""
    own = own[np.argsort(own["start_ns"], kind="stable")]
    if not len(own):
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(own["piece"] == 0)
    begins = begins if len(begins) else np.zeros(1, np.int64)
    ends = np.append(begins[1:], len(own)) - 1
    return np.stack([own["start_ns"][begins], own["end_ns"][ends]], axis=1)


def _in_phases(rows: Rows, own: pd.DataFrame, breaks: Rows) -> pd.DataFrame:
    """The rows that lie in a phase, with its number."""
    import pandas as pd

    starts, ends = own["start_ns"].to_numpy(), own["end_ns"].to_numpy()
    place = np.searchsorted(starts, rows["start_ns"], side="right") - 1
    inside = (place >= 0) & (rows["start_ns"] < ends[np.maximum(place, 0)])
    paused = np.zeros(len(rows), bool)
    if len(breaks):
        after = np.searchsorted(breaks[:, 0], rows["start_ns"], side="right") - 1
        paused = (after >= 0) & (rows["start_ns"] < breaks[np.maximum(after, 0), 1]) & (rows["lane"] == 0)
    columns = {name: rows[name][inside] for name in COLUMNS} | {"communication": is_communication(rows[inside])}
    return pd.DataFrame(columns | {"paused": paused[inside], "phase": own["phase"].to_numpy()[place[inside]]})


def _cut(breaks: Rows, own: pd.DataFrame) -> pd.DataFrame:
    """The pauses, cut to the phases in which they lie."""
    import pandas as pd

    found = []
    for phase, low, high in own[["phase", "start_ns", "end_ns"]].itertuples(index=False):
        inside = breaks[(breaks[:, 1] > low) & (breaks[:, 0] < high)]
        found += [(phase, max(a, low), min(b, high)) for a, b in inside.tolist()]
    return pd.DataFrame(found, columns=["phase", "start_ns", "end_ns"])
