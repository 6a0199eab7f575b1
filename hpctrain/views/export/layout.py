"""The layout of a timeline: nodes as processes, ranks as threads, and the phase of each rank over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.trace import Run
from hpctrain.trace.events import PhaseEntered, chosen
from hpctrain.trace.schema import THREADS
from hpctrain.views.export.selection import Rows, Selection
from hpctrain.views.export.traceformat import Numbers, name_process, name_thread

if TYPE_CHECKING:
    import pandas as pd

LANES = 1000  # thread numbers per rank


@dataclass(frozen=True, order=True)
class Entry:
    """A rank enters a phase at `t_ns` of the run's clock."""

    t_ns: int
    phase: int
    role: str
    strategy: str


class TrackLayout:
    """Numbers and names of processes and threads. `run_pid`, `run_tid`: the track for everything that concerns all
    ranks.

    `events`: the run's events on the selected ranks; `entries`: entries into phases by (rank, attempt), sorted by time.
    """

    def __init__(self, run: Run, selection: Selection) -> None:
        self._run, self._ranks = run, selection.ranks
        self._node = {rank: int(run.attributes(rank).get("node", 0)) for rank in selection.ranks}
        self.run_pid, self.run_tid = max(self._node.values()) + 1, LANES * run.size + 1
        self.events = run.events(selection.ranks)
        self.entries = _entries(self.events)
        self._named: set[tuple[int, int]] = set()

    def pid(self, rank: int) -> int:
        return self._node[rank]

    def tid(self, rank: int, lane: int = 0) -> int:
        return LANES * rank + lane + 1  # Perfetto treats thread 0 as missing

    def speaks(self, rank: int) -> bool:
        """Whether the rank represents its node: the lowest selected rank there."""
        return rank == min(other for other in self._ranks if self._node[other] == self._node[rank])

    def since_start(self, t_ns: Numbers) -> Numbers:
        """Nanoseconds since the run's start, at least 0: Perfetto drops events with negative times."""
        return np.maximum(t_ns - self._run.start_ns, 0)

    def phases_at(self, rank: int, attempt: int, t_ns: Numbers) -> Numbers:
        """The rank's phase at each time; -1 before the first."""
        own = self.entries.get((rank, attempt), [])
        phases = np.array([-1, *(entry.phase for entry in own)], np.int64)
        return phases[np.searchsorted([entry.t_ns for entry in own], t_ns, side="right")]

    # -- names -----------------------------------------------------------------------------------------------
    def name_all(self) -> Iterator[str]:
        yield from name_process(self.run_pid, "run", 0)
        yield from name_thread(self.run_pid, self.run_tid, "phases", 0)
        for node in sorted(set(self._node.values())):
            host = self._run.attributes(next(r for r in self._ranks if self._node[r] == node)).get("host", "")
            yield from name_process(node, f"node {node} ({host})" if host else f"node {node}", node + 1)
        for rank in self._ranks:
            yield from self._name(rank, 0)

    def name_lanes(self, rank: int, spans: Rows) -> Iterator[str]:
        """Name the threads of these spans that have no name yet."""
        for lane in np.unique(spans["lane"]).tolist():
            yield from self._name(rank, lane)

    def _name(self, rank: int, lane: int) -> Iterator[str]:
        if (rank, lane) not in self._named:
            self._named.add((rank, lane))
            name = f"rank {rank} {THREADS[lane]}" if lane else f"rank {rank} ({self._roles(rank)})"
            yield from name_thread(self.pid(rank), self.tid(rank, lane), name, self.tid(rank, lane))

    def _roles(self, rank: int) -> str:
        """ "worker", "worker, then server" ..."""
        roles = [entry.role for (of_rank, _), own in sorted(self.entries.items()) if of_rank == rank for entry in own]
        changes = roles[:1] + [role for before, role in pairwise(roles) if role != before]
        return ", then ".join(changes) or str(self._run.attributes(rank).get("role", ""))


def _entries(events: pd.DataFrame) -> dict[tuple[int, int], list[Entry]]:
    found: dict[tuple[int, int], list[Entry]] = {}
    for rank, attempt, t_ns, entry in chosen(events, PhaseEntered):
        found.setdefault((rank, attempt), []).append(Entry(t_ns, entry.phase, entry.role, entry.strategy))
    return found
