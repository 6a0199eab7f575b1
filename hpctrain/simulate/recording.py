"""What a simulation counts of each rank: where its virtual time went."""

from __future__ import annotations

from collections import defaultdict
from math import nan
from typing import Any

from hpctrain.trace.events import Event
from hpctrain.trace.recorder import Recorder

COMPUTING = frozenset(["data", "forward", "backward", "reduce", "update", "encode", "decode"])


def kind_of(kind: int | str, id: int) -> str:
    """The kind of a span; a sum over ranks, which has a number, is not one of a rank's own."""
    return "all_reduce" if kind == "reduce" and id != -1 else str(kind)


class TimeTally:
    """Totals of one rank. `nanoseconds`: by kind of span, without the spans within it; of each step: when it ended
    (`steps`, virtual nanoseconds), with how many samples of this worker, its loss, whether a round ended with it, and
    how many updates it was behind (`staleness`)."""

    def __init__(self) -> None:
        self.nanoseconds: dict[str, int] = defaultdict(int)
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.samples: list[int] = []
        self.rounds: list[bool] = []
        self.staleness: list[int] = []
        self._open: list[list[Any]] = []  # kind, when the current piece began

    def open(self, kind: str, now: int) -> None:
        """A span begins."""
        if self._open:
            last = self._open[-1]
            self.nanoseconds[last[0]] += now - last[1]
        self._open.append([kind, now])

    def close(self, now: int) -> None:
        """The innermost span ends."""
        kind, began = self._open.pop()
        self.nanoseconds[kind] += now - began
        if self._open:
            self._open[-1][1] = now

    def step(self, now: int, loss: float, samples: int, ends_round: bool, stale: int) -> None:
        """A step has ended."""
        self.steps.append(now)
        self.losses.append(loss)
        self.samples.append(samples)
        self.rounds.append(ends_round)
        if stale >= 0:
            self.staleness.append(stale)

    def whole_rounds(self, begin: float) -> tuple[int, int] | None:
        """(first, last): the step that ends the first round after that share of the steps, and the one that ends the
        last round; None if there are not two."""
        ends = [step for step, ended in enumerate(self.rounds) if ended]
        later = [step for step in ends if step + 1 >= begin * len(self.steps)]
        return (later[0], later[-1]) if len(later) > 1 else None


class TallyRecorder(Recorder):
    """Only counts."""

    __slots__ = ("tally",)
    keeps = False

    def __init__(self, now: Any) -> None:
        super().__init__(now)
        self.tally = TimeTally()

    def lane(self, number: int) -> Recorder:
        return TallyRecorder(self.now)  # of a colocated server: its rank's time is the main lane's

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        self.tally.open(kind_of(kind, id), now_ns)

    def close(self, now_ns: int) -> None:
        self.tally.close(now_ns)

    def learn(self, bytes: int, peer: int, id: int) -> None:
        return None

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        return None

    def event(self, event: Event) -> None:
        return None

    def step_done(self, epoch: float, loss: float, samples: int, *row: Any, **named: Any) -> None:
        outcome, stale = (row[1], row[3]) if len(row) > 3 else ("applied", -1)
        self.tally.step(self.now(), loss, samples, outcome != "local", stale)


class KeepingRecorder(TallyRecorder):
    """Counts, and records all of it for a trace."""

    __slots__ = ()
    keeps = True

    def lane(self, number: int) -> Recorder:
        return Recorder.lane(self, number)

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        self.tally.open(kind_of(kind, id), now_ns)
        Recorder.open(self, kind, now_ns, bytes, peer, id, items, flops)

    def close(self, now_ns: int) -> None:
        self.tally.close(now_ns)
        Recorder.close(self, now_ns)

    def learn(self, bytes: int, peer: int, id: int) -> None:
        Recorder.learn(self, bytes, peer, id)

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        Recorder.passed(self, kind, start_ns, bytes, id)

    def event(self, event: Event) -> None:
        Recorder.event(self, event)

    def step_done(self, *row: Any, **named: Any) -> None:
        super().step_done(*row, **named)
        Recorder.step_done(self, *row, **named)


class CostRecorder(KeepingRecorder):
    """The same for a run without gradients: it has no losses."""

    __slots__ = ()

    def step_done(self, epoch: float, loss: float, samples: int, *row: Any, **named: Any) -> None:
        super().step_done(epoch, nan, samples, *row, **named)
