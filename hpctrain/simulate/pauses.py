"""What training stops for, evaluations and checkpoints: how many there are, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hpctrain.clock.samples import Duration, Every, RunClock, interval
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.splits import Splits, make_order
from hpctrain.job.tables import Train
from hpctrain.run.evaluate import own_part
from hpctrain.run.prepare import Prepared
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.passes import Processor

CHECKPOINT = "checkpoint"  # kind of span


@dataclass(frozen=True)
class Pauses:
    """`evaluations`, `checkpoints`: how many; `evaluating`, `saving`: seconds of all of them, None: not known."""

    evaluations: int
    evaluating: float | None
    checkpoints: int
    saving: float | None

    @property
    def seconds(self) -> float:
        """As far as known."""
        return (self.evaluating or 0.0) + (self.saving or 0.0)


@dataclass(frozen=True)
class Stage:
    """A phase of a run: `workers` train from cursor `start` to `stop`. `step`: samples, at most, of one step; `round`:
    steps after which something can be done that is due."""

    clock: RunClock
    workers: tuple[int, ...]
    start: int
    stop: int
    step: int
    round: int

    def due(self, every: Duration | None) -> tuple[int, bool]:
        """How often something is done in it, and whether it would be once more at the end of the run."""
        if every is None:
            return 0, False
        amount, epoch, total = interval(self.clock, every), self.clock.epoch, self.clock.total
        cursor, mark, steps, times = self.start, _next(amount, self.start), 0, 0
        while cursor < self.stop:
            cursor = min(cursor + self.step, cursor - cursor % epoch + epoch, self.stop)
            steps += 1
            if cursor >= mark and (steps % self.round == 0 or cursor == self.stop):
                if cursor >= total:
                    return times, True
                times, mark = times + 1, _next(amount, cursor)
        return times, False


def _next(every: int | Every, cursor: int) -> int:
    return every.next(cursor) if isinstance(every, Every) else (cursor // every + 1) * every


def stages(made: Prepared, total: int, ends: Sequence[int]) -> list[Stage]:
    """Of a run with the parts `made` that has `total` samples, and whose phases end at these cursors."""
    found = []
    for index, (start, stop) in enumerate(pairwise([0, *ends])):
        strategy, workers = made.strategy(index), tuple(made.roles[index].workers)
        clock, every = RunClock(made.epoch, made.batch * len(workers), total), getattr(strategy.options, "every", 1)
        step = made.batch if strategy.needs.queue else clock.round
        found.append(Stage(clock, workers, start, stop, step, every if isinstance(every, int) else 1))
    return found


@dataclass(frozen=True)
class PauseCosts:
    """What pauses take. `places`: the ranks' nodes; `processors`: makes those of all ranks, in a world."""

    calibration: Calibration
    places: Sequence[int]
    processors: Callable[[World], Sequence[Processor]]

    def of(self, train: Train, splits: Splits, made: Prepared, course: Sequence[Stage]) -> Pauses:
        """Of a run with the keys `train`, on this data."""
        during = splits.validation if splits.validation is not None else splits.test
        final = splits.test if splits.test is not None else splits.validation
        evaluated = []
        for stage in course:
            count, at_end = stage.due(train.evaluate_every)
            evaluated.append((stage, during, count + (at_end and during is not final)))
        evaluated.append((course[-1], final, 1))
        times, seconds = 0, list[float | None]()
        for stage, data, count in evaluated:
            if data is not None and count:
                each = self._evaluation(stage.workers, data, train.evaluation_batch)
                times += count
                seconds.append(None if each is None else count * each)
        known = [each for each in seconds if each is not None]
        saved = sum(stage.due(train.checkpoint_every)[0] for stage in course) + 1
        saving = self._saving(made)
        return Pauses(
            times,
            sum(known) if len(known) == len(seconds) else None,
            saved,
            saved * saving if saving is not None else None,
        )

    def _evaluation(self, workers: Sequence[int], data: Any, batch: int) -> float | None:
        """Seconds of an evaluation by these ranks, each its part, in forward passes of `batch` samples; None for a
        stream of unknown length."""
        samples, model = make_order(data).length, self.calibration.model
        if samples is None:
            return None
        world = World(len(self.places), self.places, isolate_torch=False)
        processors = self.processors(world)

        def body(comm: Communicator) -> None:
            if comm.rank not in workers:
                return
            processor = processors[comm.rank]
            low, high = own_part(samples, workers.index(comm.rank), len(workers))
            processor.draw(model.forward.spread)
            for start in range(low, high, batch):
                count = min(batch, high - start)
                processor.work(model.forward.seconds(count) + self.calibration.span("data").seconds(count))

        world.run(body)
        return world.time / 1e9

    def _saving(self, made: Prepared) -> float | None:
        """Seconds in which a checkpoint is written; None: not known for as many bytes."""
        layout, cost = made.replica.layout, self.calibration.spans.get(CHECKPOINT)
        nbytes = layout.length * layout.dtype.itemsize
        if cost is None or (cost.most and not cost.knows(nbytes)):  # a file has a price besides that of its bytes
            return None
        return cost.seconds(nbytes)
