"""Reads a run repeatedly and returns its state each time. Does not use the terminal."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from hpctrain.errors import TraceError
from hpctrain.filenames import JOB, METRICS, MODEL
from hpctrain.text import escaped
from hpctrain.trace.events import Event, PhaseEntered
from hpctrain.trace.files import UNREADABLE, Rows, event_of, why
from hpctrain.trace.reader import name_ranks, size_of
from hpctrain.trace.writer import trace_files
from hpctrain.views.watch.evaluations import read_evaluations
from hpctrain.views.watch.history import History
from hpctrain.views.watch.plan import read_plan
from hpctrain.views.watch.recent import Recent, Sums
from hpctrain.views.watch.snapshot import EvaluationRow, Notice, RankView, RunStatus, Snapshot
from hpctrain.views.watch.tail import News, Tail

STRAGGLER = 1.5  # times the other workers' median time for the forward and backward pass of a sample
STRAGGLER_STEPS = 3  # ... over at least this many steps
SILENT_SECONDS = 10.0  # a rank without new rows counts as silent after this time ...
SILENT_TIMES = 5  # ... and this many times its flush interval and its step
PACE_SECONDS = 120  # the time left is computed from the pace over these last seconds
SHOWN_EVENTS = ("rule", "switch", "rebalance", "failure", "checkpoint")


@dataclass
class _Rank:
    """What is known of a rank. `phase`: -1 until it has reported one; `last_ns`: the end of its last row."""

    tail: Tail
    recent: Recent = field(default_factory=Recent)
    sums: Sums = field(default_factory=Sums)
    phase: int = -1
    role: str = ""
    last_ns: int | None = None

    @property
    def begun_ns(self) -> int:
        """When the rank began to write."""
        stamp = np.array([self.tail.file.attributes.get("clock_ns", 0)], np.int64)
        return int(self.tail.file.correct(stamp)[0])


@dataclass
class _Attempt:
    """What is known of an attempt. `faults`: by rank, what cannot be read; `pace`: (time, cursor)."""

    number: int
    ranks: dict[int, _Rank] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    notices: dict[str, tuple[int, str]] = field(default_factory=dict)
    phase: int = -1
    strategy: str = ""
    cursor: int = -1
    epoch: float = 0.0
    pace: list[tuple[int, int]] = field(default_factory=list)

    @property
    def begun_ns(self) -> int:
        """When the first rank began to write, among those that have written."""
        return min((rank.begun_ns for rank in self.ranks.values() if rank.last_ns is not None), default=0)

    @property
    def elapsed(self) -> float:
        """Seconds from `begun_ns` to the end of the last row."""
        last = [rank.last_ns for rank in self.ranks.values() if rank.last_ns is not None]
        return (max(last) - self.begun_ns) / 1e9 if last else 0.0

    @property
    def size(self) -> int:
        """The number of ranks, as given by most of their files."""
        return size_of([rank.tail.file for rank in self.ranks.values()])

    @property
    def nodes(self) -> list[int]:
        """The node of every rank; a missing rank is assumed to be on node 0."""
        present = {rank: int(of.tail.file.attributes.get("node", 0)) for rank, of in self.ranks.items()}
        return [present.get(rank, 0) for rank in range(self.size)]


class Watcher:
    """Follows the run in `folder`; `now`: returns seconds since 1970. Raises TraceError if traces are disabled."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._now = now
        self._plan = read_plan(folder)
        self._history = History()
        self._attempt = _Attempt(1)

    def look(self) -> Snapshot:
        """Read the rows new since the last look. Raises TraceError if none of the traces can be read."""
        files = trace_files(self.folder)
        newest = max((attempt for attempt, _ in files), default=1)
        while True:
            number = self._attempt.number
            self._read({rank: path for (attempt, rank), path in files.items() if attempt == number})
            if number >= newest:
                break
            self._attempt = _Attempt(number + 1)  # only the loss is kept from the previous attempt
        faults = list(self._attempt.faults.values())
        if faults and not self._attempt.ranks:
            raise TraceError(f"{self.folder}: none of its traces can be read: {'; '.join(faults[:3])}")
        return self._snapshot()

    # -- reading -------------------------------------------------------------------------------------------
    def _read(self, files: Mapping[int, Path]) -> None:
        attempt = self._attempt
        attempt.faults.clear()
        for number, path in files.items():
            try:
                rank = attempt.ranks.get(number) or self._open(path, number)
                news = rank.tail.look(self._now(), sample=number == min(files))
            except TraceError as error:
                attempt.faults[number] = str(error)
            except UNREADABLE as error:
                attempt.faults[number] = f"rank {number}: trace/{path.name} cannot be read ({why(error)})"
            else:
                if news is not None:
                    self._take(rank, news)

    def _open(self, path: Path, number: int) -> _Rank:
        tail = Tail(path, number, self._attempt.number)
        rank = self._attempt.ranks[number] = _Rank(tail, role=str(tail.file.attributes.get("role", "")))
        return rank

    def _take(self, rank: _Rank, news: News) -> None:
        attempt = self._attempt
        for event in news.events:
            self._note_event(rank, int(event["t_ns"]), event_of(event["kind"], event["json"]))
        rank.recent.add(news.spans, news.steps, takes_steps=rank.role == "worker", cut=news.cut)
        rank.sums = rank.recent.sums()
        ends = [news.spans["end_ns"], news.steps["t_ns"], news.events["t_ns"]]
        rank.last_ns = max(int(times.max()) for times in ends if len(times))
        for steps in (news.sampled, news.steps):
            if len(steps) and attempt.cursor < 0 and attempt.number > 1:
                self._history.forget(int(steps["cursor"][0]))
            self._history.add(steps)
            if len(steps) and int(steps["cursor"][-1]) >= attempt.cursor:
                attempt.cursor, attempt.epoch = int(steps["cursor"][-1]), float(steps["epoch"][-1])
        self._keep_pace(rank, news.steps)

    def _note_event(self, rank: _Rank, t_ns: int, event: Event) -> None:
        attempt = self._attempt
        if event.kind in SHOWN_EVENTS:
            newest = t_ns, str(event)
            attempt.notices[event.kind] = max(attempt.notices.get(event.kind, newest), newest)
        if not isinstance(event, PhaseEntered):
            return
        rank.phase, rank.role = event.phase, event.role
        rank.recent.begin(t_ns)
        if rank.phase > attempt.phase:
            attempt.phase, attempt.strategy = rank.phase, event.strategy
            attempt.pace.clear()

    def _keep_pace(self, rank: _Rank, steps: Rows) -> None:
        """Keep the run's cursor at the beginning and end of the phase's last seconds."""
        steps = steps[(steps["phase"] == self._attempt.phase) & (steps["cursor"] >= 0)]
        if len(steps):
            last = int(steps["t_ns"][-1])
            steps = steps[steps["t_ns"] >= last - PACE_SECONDS * 1_000_000_000]
            points = self._attempt.pace + [(int(row["t_ns"]), int(row["cursor"])) for row in steps[[0, -1]]]
            self._attempt.pace = sorted(p for p in points if p[0] >= last - PACE_SECONDS * 1_000_000_000)

    # -- summing up ----------------------------------------------------------------------------------------
    def _snapshot(self) -> Snapshot:
        attempt, plan = self._attempt, self._plan
        changed = [rank.tail.changed for rank in attempt.ranks.values()]
        since = max(changed) if changed else _begun(self.folder)
        silence = max(0.0, self._now() - since)
        total = self._total()
        evaluations = read_evaluations(self.folder / METRICS)
        views = self._views(silence)
        rates = [view.rate for view in views if view.rate is not None]
        return Snapshot(
            name=plan.name or escaped(self.folder.name),
            folder=escaped(shlex.quote(str(self.folder))),
            status=self._status(silence),
            since=since,
            silence=silence,
            attempt=attempt.number,
            size=attempt.size,
            nodes=len(set(attempt.nodes)),
            elapsed=attempt.elapsed,
            phase=attempt.phase,
            phases=plan.phases,
            strategy=attempt.strategy,
            epoch=attempt.epoch if attempt.cursor >= 0 else None,
            epochs=plan.epochs,
            cursor=attempt.cursor if attempt.cursor >= 0 else None,
            total=total,
            left=self._left(total),
            may_stop_early=plan.may_stop_early,
            rate=sum(rates) if rates else None,
            loss=self._loss(),
            history=tuple(self._history.means()),
            metric=escaped(plan.metric),
            evaluations=tuple({row.split: row for row in evaluations}.values()),
            best=_best(evaluations, plan.higher_is_better),
            notices=self._notices(),
            ranks=views,
            notes=self._notes(),
        )

    def _status(self, silence: float) -> RunStatus:
        tails = [rank.tail for rank in self._attempt.ranks.values()]
        if not tails:
            return RunStatus.WAITING
        silent = silence > max(map(self._patience, self._attempt.ranks.values()))
        if all(tail.closed for tail in tails) and (len(tails) == self._attempt.size or silent):
            whole = (self.folder / MODEL).exists() or any(tail.file.simulated for tail in tails)
            return RunStatus.FINISHED if whole else RunStatus.STOPPED
        return RunStatus.SILENT if silent else RunStatus.RUNNING

    def _patience(self, rank: _Rank) -> float:
        """Seconds that may pass between two writes of a rank, which writes only after steps."""
        step = rank.sums.seconds / rank.sums.steps if rank.sums.steps else 0.0
        return max(SILENT_SECONDS, SILENT_TIMES * max(self._plan.flush_seconds, step))

    def _views(self, silence: float) -> tuple[RankView, ...]:
        attempt = self._attempt
        planned = self._plan.roles(attempt.phase, attempt.nodes)
        roles = {
            number: rank.role if rank.phase == attempt.phase else planned.get(number, rank.role)
            for number, rank in attempt.ranks.items()
        }
        slowness = self._slowness({number for number, role in roles.items() if role == "worker"})
        return tuple(self._view(number, roles[number], slowness.get(number), silence) for number in sorted(roles))

    def _view(self, number: int, role: str, slowness: float | None, silence: float) -> RankView:
        """`silence`: of the whole run. A rank counts as silent if others have long continued without it."""
        rank = self._attempt.ranks[number]
        ended, silent = rank.tail.closed, self._now() - rank.tail.changed
        late = None if ended or silent - silence <= self._patience(rank) else silent
        if rank.phase != self._attempt.phase:  # the rank has not written in this phase yet
            return RankView(number, role, ended=ended, silent=late if role == "worker" else None)
        sums = rank.sums
        stale, count, largest = sums.staleness
        return RankView(
            number,
            role,
            rate=sums.rate,
            sample_seconds=sums.sample_seconds,
            waiting=sums.waiting_share,
            staleness=(stale / count, largest) if count else None,
            slowness=slowness,
            silent=late,
            ended=ended,
        )

    def _slowness(self, workers: set[int]) -> dict[int, float]:
        """By straggler: its compute time per sample relative to the median of the other workers."""
        sums = {number: self._attempt.ranks[number].sums for number in workers}
        took = {n: s.sample_seconds for n, s in sums.items() if s.sample_seconds and s.steps >= STRAGGLER_STEPS}
        found = {}
        for number, seconds in took.items():
            others = [other for n, other in took.items() if n != number]
            if others and seconds >= STRAGGLER * median(others):
                found[number] = seconds / median(others)
        return found

    def _loss(self) -> float | None:
        sums = sum((rank.sums for rank in self._attempt.ranks.values()), Sums())
        return sums.loss / sums.samples if sums.samples else None

    def _total(self) -> int | None:
        attempt = self._attempt
        if attempt.cursor < 0 or attempt.epoch <= 0 or not math.isfinite(attempt.cursor / attempt.epoch):
            return None
        planned = self._plan.roles(0, attempt.nodes)  # empty for a custom strategy
        roles = {number: rank.tail.file.attributes.get("role") for number, rank in attempt.ranks.items()}
        workers = list((planned or roles).values()).count("worker")
        return self._plan.total(round(attempt.cursor / attempt.epoch), workers)

    def _left(self, total: int | None) -> float | None:
        pace = self._attempt.pace
        if total is None or not pace or pace[-1][1] <= pace[0][1]:
            return None
        seconds = (pace[-1][0] - pace[0][0]) / 1e9
        return max(0, total - self._attempt.cursor) * seconds / (pace[-1][1] - pace[0][1])

    def _notices(self) -> tuple[Notice, ...]:
        begun = self._attempt.begun_ns
        events = sorted((t_ns, kind, text) for kind, (t_ns, text) in self._attempt.notices.items())
        return tuple(Notice((t_ns - begun) / 1e9, kind, text) for t_ns, kind, text in events)

    def _notes(self) -> tuple[str, ...]:
        attempt = self._attempt
        found = attempt.ranks.keys() | attempt.faults.keys()
        missing = [rank for rank in range(attempt.size) if rank not in found]
        notes = [f"no trace file yet from {name_ranks(missing)}"] if missing else []
        damaged = {number: rank.tail.damaged for number, rank in attempt.ranks.items() if rank.tail.damaged}
        notes += [f"rank {number}: {rows} damaged rows of its trace are left out" for number, rows in damaged.items()]
        notes += attempt.faults.values()
        if self._plan.job is None:
            notes.append("job.toml cannot be read, so the remaining time is unknown")
        return tuple(map(escaped, notes))


def _begun(folder: Path) -> float:
    path = folder / JOB
    return (path if path.exists() else folder).stat().st_mtime


def _best(evaluations: list[EvaluationRow], higher_is_better: bool) -> EvaluationRow | None:
    """The best evaluation of the split that is evaluated during the run, if there are at least two."""
    rows = [row for row in evaluations if row.split == evaluations[0].split]
    if len(rows) < 2:
        return None
    return (max if higher_is_better else min)(rows, key=lambda row: row.metric)
