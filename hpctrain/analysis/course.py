"""All ranks' spans in one frame, each in its phase: what times, waits and traffic are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.trace.schema import KIND_CODES

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace.reader import Run

Rows = np.ndarray[Any, Any]
PAUSES = ("evaluate", "checkpoint", "switch")
MOST = 6_000_000  # spans that are held in memory
STRETCHES = 64


@dataclass
class Course:
    """`spans`: attempt, phase, rank, lane, step, kind (code), start_ns, end_ns, bytes, peer, id; in the order of rank,
    lane and time, only of training: what lies in evaluations, checkpoints and switches is left out.

    `pauses`: attempt, phase, rank, start_ns, end_ns of these. `share`: of the run's spans that are in `spans`; below 1
    they are those of equally spaced stretches of time, and sums have to be divided by it.
    """

    spans: pd.DataFrame
    pauses: pd.DataFrame
    share: float


def read_course(run: Run, phases: pd.DataFrame, most: int = MOST) -> Course:
    """Notes in the run if it is a sample."""
    import pandas as pd

    count = sum(len(block) for _, _, block in run.blocks("spans")) if _huge(run, most) else 0
    share = min(1.0, most / count) if count else 1.0
    stretches = None
    if share < 1.0 and len(phases):
        stretches = _stretches(int(phases["start_ns"].min()), int(phases["end_ns"].max()), share)
        run.notes.append(f"waiting and traffic are those of {STRETCHES} stretches with {share:.0%} of the run's spans")
    parts, pauses = [], []
    for attempt, rank in sorted(set(zip(phases["attempt"].tolist(), phases["rank"].tolist(), strict=True))):
        own = phases[(phases["attempt"] == attempt) & (phases["rank"] == rank)]
        rows = _read(run, rank, attempt, stretches)
        breaks = _pauses(rows)
        parts.append(_in_phases(rows, own, breaks).assign(attempt=attempt, rank=rank))
        pauses.append(_cut(breaks, own).assign(attempt=attempt, rank=rank))
    empty = pd.DataFrame(columns=["attempt", "phase", "rank", "lane", "step", "kind", "start_ns", "end_ns", "bytes",
                                  "peer", "id"], dtype=np.int64)  # fmt: skip
    spans = pd.concat(parts, ignore_index=True) if parts else empty
    return Course(spans, pd.concat(pauses, ignore_index=True) if pauses else empty, share)


def _huge(run: Run, most: int) -> bool:
    return sum(run.rows("spans").values()) > most


def _stretches(start: int, end: int, share: float) -> Rows:
    """Bounds of equal stretches, as many nanoseconds in as between them: even numbers begin, odd ones end them."""
    begins = np.linspace(start, end, STRETCHES, endpoint=False)
    width = (end - start) / STRETCHES * share
    return np.stack([begins, begins + width], axis=1).ravel().astype(np.int64)


def _read(run: Run, rank: int, attempt: int, stretches: Rows | None) -> Rows:
    blocks = []
    for _, of_attempt, block in run.blocks("spans", rank):
        if of_attempt == attempt:
            if stretches is not None:
                block = block[np.searchsorted(stretches, block["start_ns"], side="right") % 2 == 1]
            blocks.append(block)
    rows = np.concatenate(blocks) if blocks else next(_no_rows())
    return rows[np.lexsort((rows["end_ns"], rows["start_ns"], rows["lane"]))]


def _no_rows() -> Iterator[Rows]:
    from hpctrain.trace.schema import SPANS

    yield np.zeros(0, SPANS)


def _pauses(rows: Rows) -> Rows:
    """(start, end) of the rank's own evaluations, checkpoints and switches, what lies inside of them included."""
    own = rows[(rows["lane"] == 0) & np.isin(rows["kind"], [KIND_CODES[kind] for kind in PAUSES])]
    if not len(own):
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(own["piece"] == 0)
    if not len(begins):
        begins = np.zeros(1, np.int64)
    ends = np.append(begins[1:], len(own)) - 1
    return np.stack([own["start_ns"][begins], own["end_ns"][ends]], axis=1)


def _in_phases(rows: Rows, own: pd.DataFrame, breaks: Rows) -> pd.DataFrame:
    """The rows of training, with the phase that they are in."""
    import pandas as pd

    starts, ends = own["start_ns"].to_numpy(), own["end_ns"].to_numpy()
    place = np.searchsorted(starts, rows["start_ns"], side="right") - 1
    inside = (place >= 0) & (rows["start_ns"] < ends[np.maximum(place, 0)]) if len(own) else np.zeros(len(rows), bool)
    if len(breaks):
        after = np.searchsorted(breaks[:, 0], rows["start_ns"], side="right") - 1
        paused = (after >= 0) & (rows["start_ns"] < breaks[np.maximum(after, 0), 1])
        inside &= ~(paused & (rows["lane"] == 0))
    rows, place = rows[inside], place[inside]
    names = ("lane", "step", "kind", "start_ns", "end_ns", "bytes", "peer", "id")
    return pd.DataFrame({name: rows[name] for name in names} | {"phase": own["phase"].to_numpy()[place]})


def _cut(breaks: Rows, own: pd.DataFrame) -> pd.DataFrame:
    """The pauses that lie in the phases, cut to them."""
    import pandas as pd

    found = []
    for phase, low, high in own[["phase", "start_ns", "end_ns"]].itertuples(index=False):
        inside = breaks[(breaks[:, 1] > low) & (breaks[:, 0] < high)]
        found += [(phase, max(a, low), min(b, high)) for a, b in inside.tolist()]
    return pd.DataFrame(found, columns=["phase", "start_ns", "end_ns"])
