"""Runs built by hand, so that the results of analysing their traces are known.

    with HandMade(tmp_path, size=2) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("forward", 0.0, 2.0, step=0)
        run[0].done(5.0, step=0, loss=1.5, samples=32, cursor=64)
    Run(tmp_path)

Times are milliseconds of the run's clock. The files are written by the real writer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.trace import Recorder, TraceWriter, link_ranks, trace_path
from hpctrain.trace.events import Logged, PhaseEntered
from hpctrain.trace.versions import parsed

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.job import Job
    from hpctrain.run.session import Session
    from hpctrain.trace.reader import Run

JOB = 'model = "mlp"\ndata = "digits"\n'


class HandMadeRank:
    """One rank's trace. `offset_ms`: how far its clock is behind the run's."""

    def __init__(self, folder: Path, rank: int, size: int, offset_ms: float = 0.0, **attributes: Any) -> None:
        self._now, self._offset = 0, int(offset_ms * 1e6)
        self.recorder = Recorder(lambda: self._now - self._offset)
        known = {"rank": rank, "size": size, "role": "worker", "node": 0, "host": "host0", "device": "cpu", "job": JOB}
        self.writer = TraceWriter(trace_path(folder, rank, attributes.get("attempt", 1)), self.recorder,
                                  {"attempt": 1, **known, **attributes})  # fmt: skip
        self.recorder.clock(self._offset, 100)

    def _at(self, ms: float) -> int:
        self._now = round(ms * 1e6)
        return self._now - self._offset

    def span(
        self, kind: str, start: float, end: float, step: int = -1, bytes: int = 0, peer: int = -1, id: int = -1,
        lane: int = 0, flops: float = 0.0,
    ) -> None:  # fmt: skip
        """Spans of one lane must be given in time order and must not overlap."""
        recorder = self.recorder.lane(lane)
        recorder.step = step
        recorder.open(kind, self._at(start), bytes, peer, id, 0, flops)
        recorder.close(self._at(end))

    def done(self, at: float, step: int, loss: float = 1.0, samples: int = 32, **columns: Any) -> None:
        """A row of /steps: see schema.STEPS."""
        self._at(at)
        self.recorder.step = step
        self.recorder.step_done(columns.pop("epoch", 0.0), loss, samples, columns.pop("lr", 0.1), **columns)

    def event(self, at: float, kind: str, text: str = "") -> None:
        """The event that this message describes."""
        self._at(at)
        self.recorder.event(parsed(kind, text))

    def log(self, at: float, name: str, value: float, step: int, samples: int) -> None:
        """What a program logs."""
        self._at(at)
        self.recorder.event(Logged(name, value, step, samples))

    def phase(self, at: float, index: int, role: str, strategy: str) -> None:
        """The event that every rank records when a phase begins."""
        self.event(at, PhaseEntered.kind, str(PhaseEntered(index, role, strategy)))

    def resource(self, at: float, cpu: float, resident: int, *rest: Any) -> None:
        self._at(at)
        self.recorder.resource(cpu, resident, *rest)

    def close(self) -> None:
        """As at the end of a run, but without the span of the last flush: the file holds what the test wrote."""
        self.writer._append()
        self.writer._file.close()
        self.writer._file = None

    def kill(self) -> None:
        """As after kill -9: flushed, but never closed."""
        self.writer._append()
        self.writer._file.flush()
        file = Path(self.writer.path)
        data = file.read_bytes()
        self.writer._file.close()
        self.writer._file = None
        file.write_bytes(data)


class HandMade:
    """A run of `size` ranks. `roles`, `nodes`: per rank; `offsets`: see HandMadeRank; `missing`: ranks without a
    file."""

    def __init__(
        self, folder: Path, size: int, roles: list[str] | None = None, nodes: list[int] | None = None,
        offsets: list[float] | None = None, missing: tuple[int, ...] = (), attempt: int = 1, job: str = JOB,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.ranks = {}
        (self.folder / "job.toml").write_text(job)
        for rank in range(size):
            if rank not in missing:
                node = nodes[rank] if nodes else 0
                self.ranks[rank] = HandMadeRank(
                    self.folder, rank, size, offsets[rank] if offsets else 0.0, role=roles[rank] if roles else "worker",
                    node=node, host=f"host{node}", attempt=attempt, job=job,
                )  # fmt: skip

    def __getitem__(self, rank: int) -> HandMadeRank:
        return self.ranks[rank]

    def __enter__(self) -> HandMade:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for rank in self.ranks.values():
            if rank.writer._file is not None:
                rank.close()
        link_ranks(self.folder)


Loop = Callable[["Session"], None]


def train_traced(folder: Path, job: Job, size: int, loop: Loop | None = None, **world: Any) -> Run:
    """Train over virtual ranks (with `World`'s arguments), by `loop` or the standard one; traces in virtual time go to
    `folder`."""
    from hpctrain.comm.virtual.world import World
    from hpctrain.run.api import fit, session
    from hpctrain.run.folder import Narrator
    from hpctrain.trace import open_run

    ranks = World(size, **world)
    recorders = [Recorder(lambda: ranks.time) for _ in range(size)]
    ranks.recorders = recorders

    def body(comm: Communicator) -> Path:
        with session(job, comm, out=Narrator(enabled=False)) as running:
            (loop or fit)(running)
        return running.result.folder

    folders = ranks.run(body)
    for rank, recorder in enumerate(recorders):
        facts = {"rank": rank, "size": size, "role": "worker", "node": ranks.nodes[rank], "host": "virtual",
                 "attempt": 1, "device": "cpu", "job": job.dump()}  # fmt: skip
        TraceWriter(trace_path(folder, rank), recorder, facts).close()
    link_ranks(folder)
    for name in ("job.toml", "metrics.csv", "examples.json"):
        if (folders[0] / name).exists():
            (folder / name).write_text((folders[0] / name).read_text())
    return open_run(folder)
