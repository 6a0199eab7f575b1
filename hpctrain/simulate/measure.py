"""Measures what a job's step costs on this machine: a few steps of it on virtual ranks, one after the other.

Times are this thread's processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.splits import Splits
from hpctrain.job import Job
from hpctrain.replica.replica import Replica
from hpctrain.run.api import fit_batch
from hpctrain.run.folder import title
from hpctrain.run.prepare import Prepared, prepare, prepare_evaluation
from hpctrain.simulate.calibration import NO_CODEC, SUM, Calibration, MeasuredCost, ModelCosts, codec_name
from hpctrain.simulate.opened import only_steps, opened
from hpctrain.simulate.samples import PASSES, Samples
from hpctrain.trace.recorder import Recorder

FIRST, LEAST, MOST = 3, 8, 60  # steps: to warm up, and to measure
SHORT = 4  # steps
COMMUNICATION = frozenset(["send", "recv", "wait", "reduce"])  # of a communicator, if they have an id
LIMIT = 4.0  # seconds that the measured steps of a strategy may take, about


class BackwardOrder:
    """In which order backward completes gradients, and when: mean shares of the pass."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.parameters = 0
        self._seconds: list[float] = []
        self._at = 0.0
        self._place = -1  # in the pass; negative between passes that count

    def follow(self, replica: Replica) -> None:
        """Listen to this replica's backward passes."""
        self.parameters = replica.layout.parameters
        replica.listen(self._note)

    def begin(self) -> None:
        """A backward pass begins."""
        self._at, self._place = time.thread_time(), 0

    def _note(self, index: int) -> None:
        now = time.thread_time()
        if self._place < 0:
            return
        if self._place < len(self.order):
            if self.order[self._place] == index:  # passes may differ; the first one counts
                self._seconds[self._place] += now - self._at
        elif index not in self.order:
            self.order.append(index)
            self._seconds.append(now - self._at)
        self._at, self._place = now, self._place + 1

    def end(self) -> None:
        """The pass has ended: what follows the last gradient belongs to it."""
        if self._place == len(self._seconds) > 0:
            self._seconds[-1] += time.thread_time() - self._at
        self._place = -1

    @property
    def shares(self) -> list[float]:
        """The part of the pass that ends with each gradient, in that order."""
        total = sum(self._seconds) or 1.0
        return [seconds / total for seconds in self._seconds]


@dataclass
class Measuring:
    """What all stopwatches of a run measure into; None: nothing yet, or no longer. `seconds`: in rank 0's spans."""

    samples: Samples | None = None
    order: BackwardOrder | None = None
    seconds: float = 0.0


class Stopwatch(Recorder):
    """Measures spans of a virtual rank in processor time: what each took without the spans within it.

    The communicator's own spans do not count: on virtual ranks other ranks run in them. `leads`: whether it is rank
    0's.
    """

    __slots__ = ("_into", "_leads", "_open")

    def __init__(self, into: Measuring, leads: bool) -> None:
        super().__init__(lambda: 0)
        self._into, self._leads = into, leads
        self._open: list[list[Any]] = []  # kind, amount, seconds so far, when the current piece began

    def lane(self, number: int) -> Recorder:
        return Stopwatch(self._into, leads=False)

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        now = time.thread_time()
        if self._open:
            self._open[-1][2] += now - self._open[-1][3]
        own = kind in COMMUNICATION and id != -1
        self._open.append(["" if own else kind, items if kind in PASSES else bytes, 0.0, now])
        if kind == "backward" and self._leads and self._into.order is not None:
            self._into.order.begin()

    def close(self, now_ns: int) -> None:
        kind, amount, seconds, began = self._open.pop()
        now, into = time.thread_time(), self._into
        if self._open:
            self._open[-1][3] = now
        if kind == "backward" and self._leads and into.order is not None:
            into.order.end()
        if kind and amount and into.samples is not None:
            into.samples.add(str(kind), amount, seconds + now - began)
            into.seconds += seconds + now - began if self._leads else 0.0

    def learn(self, bytes: int, peer: int, id: int) -> None:
        self._open[-1][0] = ""


def measure(job: Job, nodes: Sequence[int]) -> Calibration:
    """Measure steps of every strategy of `job` on virtual ranks on these nodes, with one thread, for about five seconds
    each. Raises HpctrainErrors as training does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples, order = Samples(), BackwardOrder()
        for phase, each in enumerate(job.schedule):
            samples.codec = codec_name(each.strategy.options)
            _measure(job.only(phase), nodes, samples, order)
        if not any(kind == SUM for _, kind in samples.seen):  # with servers, only at the end of an epoch
            samples.codec = NO_CODEC
            _run(job.only(0).override(["strategy=all_reduce"]), nodes, FIRST + LEAST, samples)
        beside = _beside_spans(job.only(0).override(["strategy=all_reduce"]))
    finally:
        torch.set_num_threads(threads)
    return Calibration(
        source=f"steps of {title(job.name, job.overrides)}, measured on one core",
        model=ModelCosts(
            name=job.model.name,
            parameters=order.parameters,
            forward=samples.cost("forward"),
            backward=samples.cost("backward"),
            order=order.order,
            shares=order.shares,
        ),
        spans=samples.spans(),
        codecs=samples.codecs(),
        step=MeasuredCost(fixed_s=beside),
    )


def _measure(job: Job, nodes: Sequence[int], samples: Samples, order: BackwardOrder) -> None:
    """With the job's batch, and with half of it."""
    job, round = _short_rounds(job)
    fewest = max(FIRST, round)
    began = time.thread_time()
    _run(job, nodes, fewest)
    each = (time.thread_time() - began) / fewest
    sizes = sorted({max(1, job.train.batch_size // 2), job.train.batch_size})
    least = LEAST if LEAST * each < LIMIT else 2
    steps = FIRST + max(min(MOST, max(least, int(LIMIT / len(sizes) / each))), 2 * round)
    for size in sizes:
        _run(job.override([f"train.batch_size={size}"]), nodes, steps, samples, order)


def _short_rounds(job: Job) -> tuple[Job, int]:
    """The job with rounds of a few steps, and how many: what a round costs does not depend on their number."""
    options = job.schedule[0].strategy.options
    if not hasattr(options, "every"):
        return job, 1
    fragments = getattr(options, "fragments", 1)
    round = fragments * max(-(-SHORT // fragments), getattr(options, "delay", 0) + 1)
    return job.override([f"strategy.every={round}"]), round


def _beside_spans(job: Job) -> float:
    """Seconds that a step of a single rank takes besides its spans."""
    return max(0.0, median(_run(job, [0], FIRST + 2 * LEAST, Samples())))


def _run(
    job: Job,
    nodes: Sequence[int],
    steps: int,
    samples: Samples | None = None,
    order: BackwardOrder | None = None,
) -> list[float]:
    """Take `steps` steps, of which all but the first few are measured; returns what each of these took besides rank 0's
    spans, in seconds."""
    into, marks = Measuring(), list[float]()
    watches = [Stopwatch(into, rank == 0) for rank in range(len(nodes))]

    def body(comm: Communicator) -> None:
        with opened(placed, comm, _training_only) as running:
            leads = comm.rank == 0
            if leads and order is not None:
                order.follow(running.replica)
            for taken, batch in enumerate(running.batches()):
                if leads and taken >= FIRST:
                    into.samples, into.order = samples, order
                    marks.append(time.thread_time() - into.seconds)
                fit_batch(running, batch)
            if leads:
                into.samples = into.order = None

    with tempfile.TemporaryDirectory(prefix="hpctrain-measure-") as folder:
        placed = only_steps(job, steps, folder)
        World(len(nodes), nodes, recorders=watches).run(body)
    return [b - a for a, b in pairwise(marks)]


def _training_only(job: Job, comm: Communicator) -> Prepared:
    """The parts of a run that evaluates nothing."""
    parts = prepare_evaluation(job, comm)
    parts.splits = Splits(parts.splits.train)
    return prepare(job, comm, parts)
