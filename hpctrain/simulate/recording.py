"""What a simulation counts of each rank: where its virtual time went."""

from __future__ import annotations

from math import nan
from typing import Any

from hpctrain.trace.events import Event, PhaseEntered
from hpctrain.trace.recorder import Recorder

COMPUTING = frozenset(["data", "forward", "backward", "reduce", "update", "encode", "decode"])


class ComputingClock:
    """For how many nanoseconds a rank computes, in one of its lanes (its own, a colocated server's) or in several."""

    __slots__ = ("_lanes", "_since", "_total")

    def __init__(self) -> None:
        self._lanes = self._since = self._total = 0

    def begin(self, now: int) -> None:
        """One more lane computes."""
        if not self._lanes:
            self._since = now
        self._lanes += 1

    def end(self, now: int) -> None:
        """One lane no longer computes."""
        self._lanes -= 1
        if not self._lanes:
            self._total += now - self._since

    def until(self, now: int) -> int:
        """So far."""
        return self._total + (now - self._since if self._lanes else 0)


class OpenSpans:
    """The spans of one lane that are open: the innermost one says whether the lane computes."""

    __slots__ = ("_clock", "_computes")

    def __init__(self, clock: ComputingClock) -> None:
        self._clock = clock
        self._computes = [False]  # of each span, after an outermost one that is always there

    def open(self, kind: int | str, id: int, now: int) -> None:
        """A span begins. A sum over ranks, which has a number, is not computing."""
        computes = kind in COMPUTING and not (kind == "reduce" and id != -1)
        self._change(self._computes[-1], computes, now)
        self._computes.append(computes)

    def close(self, now: int) -> None:
        """The innermost span ends."""
        self._change(self._computes.pop(), self._computes[-1], now)

    def _change(self, before: bool, after: bool, now: int) -> None:
        if after and not before:
            self._clock.begin(now)
        elif before and not after:
            self._clock.end(now)


class TimeTally:
    """Totals of one rank. `computing`: of all its lanes; of each step: when it ended (`steps`, virtual nanoseconds),
    with how many samples of this worker, its loss, whether a round ended with it, and how many updates it was behind
    (`staleness`). `phase`: the one it is in."""

    def __init__(self) -> None:
        self.computing = ComputingClock()
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.samples: list[int] = []
        self.rounds: list[bool] = []
        self.staleness: list[int] = []
        self.phase = 0

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

    __slots__ = ("_spans", "tally")
    keeps = False

    def __init__(self, now: Any) -> None:
        super().__init__(now)
        self._count_into(TimeTally())

    def _count_into(self, tally: TimeTally) -> None:
        self.tally, self._spans = tally, OpenSpans(tally.computing)

    def lane(self, number: int) -> Recorder:
        if number in self._store.lanes:
            return self._store.lanes[number]
        other = type(self).__new__(type(self))
        other._begin(self.now, number, self._store)
        other._count_into(self.tally)
        return other

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        self._spans.open(kind, id, now_ns)

    def close(self, now_ns: int) -> None:
        self._spans.close(now_ns)

    def learn(self, bytes: int, peer: int, id: int) -> None:
        return None

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        return None

    def event(self, event: Event) -> None:
        if isinstance(event, PhaseEntered):
            self.tally.phase = event.phase

    def step_done(self, epoch: float, loss: float, samples: int, *row: Any, **named: Any) -> None:
        outcome, stale = (row[1], row[3]) if len(row) > 3 else ("applied", -1)
        self.tally.step(self.now(), loss, samples, outcome != "local", stale)


class KeepingRecorder(TallyRecorder):
    """Counts, and records all of it for a trace."""

    __slots__ = ()
    keeps = True

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        self._spans.open(kind, id, now_ns)
        Recorder.open(self, kind, now_ns, bytes, peer, id, items, flops)

    def close(self, now_ns: int) -> None:
        self._spans.close(now_ns)
        Recorder.close(self, now_ns)

    def learn(self, bytes: int, peer: int, id: int) -> None:
        Recorder.learn(self, bytes, peer, id)

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        Recorder.passed(self, kind, start_ns, bytes, id)

    def event(self, event: Event) -> None:
        super().event(event)
        Recorder.event(self, event)

    def step_done(self, *row: Any, **named: Any) -> None:
        super().step_done(*row, **named)
        Recorder.step_done(self, *row, **named)


class CostRecorder(KeepingRecorder):
    """The same for a run without gradients: it has no losses."""

    __slots__ = ()

    def step_done(self, epoch: float, loss: float, samples: int, *row: Any, **named: Any) -> None:
        super().step_done(epoch, nan, samples, *row, **named)


class FollowingRecorder(KeepingRecorder):
    """The same for a run with the losses of an earlier one. `known`: whether that has one for the current step."""

    __slots__ = ("known",)

    def _count_into(self, tally: TimeTally) -> None:
        super()._count_into(tally)
        self.known = True

    def step_done(self, epoch: float, loss: float, samples: int, *row: Any, **named: Any) -> None:
        super().step_done(epoch, loss if self.known else nan, samples, *row, **named)
