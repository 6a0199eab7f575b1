"""A worker's steps in one phase: batches, gradients, and the strategy's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from torch import Tensor

from hpctrain.clock.decisions import Ask
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import round_bounds
from hpctrain.data.queue import Stretch
from hpctrain.errors import HpctrainError
from hpctrain.models.losses import check_differentiable, weigh
from hpctrain.replica.blocks import is_finite
from hpctrain.replica.buckets import Buckets
from hpctrain.replica.coupling import Coupling
from hpctrain.run.scaling import LossScale
from hpctrain.strategies.base import Outcome, Strategy
from hpctrain.strategies.phase import Phase

INSPECTED = 2**14  # elements of a gradient, or of a bucket of it, that every step checks before the exchange


@dataclass
class Trainer:
    """Runs the steps of one phase on a worker: micro-batches come from `batches`, their losses go to `step`.

    `coupling`: couples the workers' models. `warn`: called with a sentence for the user. `slow`: factor by which this
    rank pretends to be slower. `check_gradient`: check every element of the gradient. `loss_scale`: factor of the loss
    in backward; it never reaches the strategy. `steps`: steps taken in the run.
    `inside`: whether a step that the other workers take part in is in progress; otherwise the program may leave.
    `samples`: this worker's samples in the current step.
    """

    phase: Phase
    strategy: Strategy
    loader: Loader
    batch_size: int
    move: Callable[[Batch], Batch]
    warn: Callable[[str], None]
    coupling: Coupling = field(default_factory=Coupling)
    slow: float = 1.0
    check_gradient: bool = False
    loss_scale: LossScale | None = None
    steps: int = 0
    inside: bool = False
    samples: int = 0
    _batch: Batch | None = None
    _left: int = 0
    _loss: float = 0.0
    _weight: float = 0.0
    _started: int = 0
    _begun: int = 0  # when this micro-batch began, without what the worker has waited for others in it
    _counts: bool = True  # whether this micro-batch belongs to the worker's share
    _examined: bool = False  # whether the first step's loss has been examined
    _buckets: Buckets | None = None

    def __post_init__(self) -> None:
        comm = self.phase.comm
        self._span = cache(lambda kind, samples: comm.span(kind, items=samples))
        if self.strategy.bucket_bytes:
            replica, strategy = self.phase.replica, self.strategy
            self._buckets = Buckets(replica, strategy.bucket_bytes, self._send, strategy.poll)

    @property
    def loss(self) -> float:
        """The mean loss of this worker's samples in the current or latest step; 0 without samples."""
        return self._loss / self._weight if self._weight else 0.0

    def batches(self) -> Iterator[Batch]:
        """This worker's micro-batches of the next step. Call `step` once for each; if there are none, call `finish`."""
        pieces, following, own = self._next_step()
        self.inside = True
        self.strategy.before()
        self.inside = False
        self.phase.replica.clear()
        self._left, self.samples, self._loss, self._weight = len(pieces), 0, 0.0, 0.0
        self.phase.step.bad, self.phase.step.seconds = 0, 0.0
        if not pieces:
            self._request(following)
        for index, (start, stop) in enumerate(pieces):
            ahead = pieces[index + 1 :] or following
            yield self._take(start, stop, ahead, counts=index < own)
            if self._batch is not None:
                raise HpctrainError("step(loss) was not called for the last batch; call it once per batch")

    def step(self, loss: Tensor | tuple[Tensor, Any]) -> Outcome | None:
        """Run backward for a micro-batch's loss, given as a mean or (sum, weight). After the last one, run the
        strategy's step and return its outcome; otherwise return None."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise HpctrainError("step(loss) was called without a batch; call it once for each of batches()")
        self.inside = True
        self._forward.__exit__(None, None, None)
        self._left -= 1
        if self._buckets is not None and self._left == 0:
            self._buckets.arm()
        weighed = weigh(loss, batch.size)
        check_differentiable(weighed)
        if not self._examined:
            self._find_foreign(weighed.term)
        with self._backward:
            scale = weighed.share / self.phase.dealing.batch * (self.loss_scale.factor if self.loss_scale else 1.0)
            self.coupling.backward(weighed.term if scale == 1.0 else weighed.term * scale)
        self.samples += batch.size
        self._weight += weighed.weight
        self._loss += weighed.total
        self._dawdle()
        if self._counts:
            self.phase.step.seconds += (self._computed() - self._begun) / 1e9
        outcome = self.finish() if self._left == 0 else None
        self.inside = False
        return outcome

    def finish(self) -> Outcome:
        """Run the strategy's step, once this worker's gradient is complete. Collective over the workers."""
        self.inside = True
        phase = self.phase
        phase.replica.check()
        loss = self.loss
        begun = phase.comm.now()
        if self._buckets is not None:
            self._buckets.flush()
        else:
            self._inspect(0, phase.replica.layout.length)
        phase.step.seconds += (phase.comm.now() - begun) / 1e9  # a device has now computed what it was given
        if self.samples and not self._examined:
            self._examined = True
            self._warn_unused()
        phase.step.number, phase.step.weight = self.steps, self._weight
        self._excuse(loss)
        outcome = self.strategy.step(self.samples, loss)
        self._rescale(outcome)
        self.steps += 1
        self.inside = False
        return outcome

    def withdraw(self) -> Ask:
        """The program has left the loop: drop the batch in progress, and report it at the others' next step, or with
        those that leave as well. Returns what is asked of all workers then."""
        phase, self.inside = self.phase, True
        if self._batch is not None:
            self._forward.__exit__(None, None, None)
            self._batch = None
        phase.replica.clear()
        phase.step.weight, phase.step.bad = None, 0
        phase.step.wish, phase.step.round_end, phase.step.number = Ask.LEAVE, phase.cursor, self.steps
        if self._buckets is not None:
            self._buckets.flush()
        return self.strategy.withdraw()

    def close(self) -> None:
        """Remove the hooks from the model after the phase's last step. Does nothing if already closed."""
        if self._buckets is not None:
            self._buckets.remove()
            self._buckets = None

    def _next_step(self) -> tuple[list[Stretch], list[Stretch], int]:
        """(micro-batches of the next step, those after it as far as known, how many of the first count)."""
        slices = self.strategy.slices()
        if slices is None:
            return self._next_round()
        pieces = [self._pieces(start, stop) for start, stop in slices]
        own = pieces[0] if pieces else []
        return own, [piece for later in pieces[1:] for piece in later], len(own)

    def _next_round(self) -> tuple[list[Stretch], list[Stretch], int]:
        phase, worker, workers = self.phase, self.phase.worker_index, len(self.phase.roles.workers)
        shares, coming = phase.step.shares, phase.step.later
        bounds = self.loader.bounds(phase.cursor, self._round_size(shares), workers, shares)
        phase.step.round_end = bounds[-1]
        own = self._pieces(bounds[worker], bounds[worker + 1])
        later = round_bounds(bounds[-1], self.loader.length, self._round_size(coming), workers, coming)
        return own + self._borrowed(bounds, len(own)), self._pieces(later[worker], later[worker + 1]), len(own)

    def _round_size(self, shares: tuple[int, ...] | None) -> int:
        return self.phase.dealing.batch * len(self.phase.roles.workers) if shares is None else sum(shares)

    def _pieces(self, start: int, stop: int) -> list[Stretch]:
        """The micro-batches of a share. With shares of unequal size they are larger or smaller, not more or fewer."""
        if self.phase.step.shares is None:
            return [(a, min(stop, a + self.batch_size)) for a in range(start, stop, self.batch_size)]
        count = self._batches(stop - start)
        ends = [start + (stop - start) * index // count for index in range(count + 1)] if count else []
        return list(pairwise(ends))

    def _batches(self, samples: int) -> int:
        """The number of micro-batches of a share."""
        if self.phase.step.shares is None:
            return -(-samples // self.batch_size)
        fewest = 2  # samples: batch norm cannot train on one
        return min(self.phase.dealing.batch // self.batch_size, max(1, samples // fewest)) if samples else 0

    def _borrowed(self, bounds: Sequence[int], own: int) -> list[Stretch]:
        """Micro-batches that do not count, for models that are coupled: copies of the round's last sample. (Their
        batches have size 0.)"""
        batches = (self._batches(b - a) for a, b in pairwise(bounds))
        return [(bounds[-1] - 1, bounds[-1])] * self.coupling.idle(batches, own)

    def _take(self, start: int, stop: int, ahead: list[Stretch], counts: bool) -> Batch:
        self._counts, self._begun = counts, self._computed()
        with self._span("data", stop - start):
            batch = self.move(self.loader.take(start, stop))
            self.coupling.before(counts)
            batch = batch if counts else Batch(batch.inputs, batch.targets, 0)
            self._request(ahead)
        self._batch = batch
        self._started = self.phase.comm.now()
        self._forward, self._backward = self._span("forward", stop - start), self._span("backward", stop - start)
        self._forward.__enter__()
        return batch

    def _request(self, pieces: list[Stretch]) -> None:
        for piece in pieces:
            self.loader.request(*piece)

    def _computed(self) -> int:
        """The time in nanoseconds, without what the worker has waited for others in its models."""
        return self.phase.comm.now() - self.coupling.waited

    def _dawdle(self) -> None:
        """Pretend to compute more slowly; the trace must show it as computation. (`span` would cost virtual time.)"""
        if self.slow > 1.0:
            comm = self.phase.comm
            took = (comm.now() - self._started) / 1e9
            comm.recorder.open("backward", comm.now())
            comm.sleep((self.slow - 1.0) * took)
            comm.recorder.close(comm.now())

    def _send(self, low: int, high: int) -> None:
        """A stretch of the gradient is final: inspect it before other workers' gradients are added."""
        self._inspect(low, high)
        self.strategy.ready(low, high)

    def _inspect(self, low: int, high: int) -> None:
        """Record a parameter whose gradient is not finite. A part is enough here: with nan = "stop" the strategy checks
        every element that it has just summed, where that is cheap, and then names the rank if it can. A scaled gradient
        is unscaled and checked whole, since overflows are common and must be known before others add to it."""
        step, gradient = self.phase.step, self.phase.replica.gradient
        if self.loss_scale is not None:
            part = gradient[low:high]
            finite = self.loss_scale.unscale(part)
        else:
            part = gradient[low : high if self.check_gradient else min(high, low + INSPECTED)]
            finite = bool(step.bad) or is_finite(part)
        if not finite and not step.bad:
            step.bad = self.phase.replica.layout.first_not_finite(part, low)

    def _excuse(self, loss: float) -> None:
        """Mark a gradient that is not finite as the loss scale's doing, unless the loss itself is not finite."""
        if self.loss_scale is not None and self.loss_scale.to_blame and loss - loss == 0.0:
            self.phase.step.bad = -self.phase.step.bad

    def _rescale(self, outcome: Outcome) -> None:
        changed = self.loss_scale.follow(outcome) if self.loss_scale is not None else None
        if changed is not None:
            self.phase.comm.recorder.event(changed)

    def _warn_unused(self) -> None:
        """Warn once per phase about parameters that are not updated because no loss depends on them."""
        replica = self.phase.replica
        used = replica.used()
        if used is not None:
            names = [slot.name for slot, has in zip(replica.layout.slots, used.tolist(), strict=True) if not has]
            self.warn(
                f"{some_of(names)} did not contribute to the loss of the first step; without a gradient there is no "
                "update and no weight decay"
            )

    def _find_foreign(self, loss: Tensor) -> None:
        """Warn about parameters that the loss depends on but that are in no module of the model, so are not trained."""
        shapes = self.phase.replica.foreign_parameters(loss)
        if shapes:
            self.warn(
                f"the loss depends on {some_of([f'of shape {shape}' for shape in shapes])} of no module in the model; "
                "hpctrain trains only the model's own parameters"
            )


def some_of(parameters: list[str], most: int = 3) -> str:
    """The first few parameters, for a sentence: "parameters a, b and 4 more"."""
    rest = len(parameters) - most
    more = f" and {rest} more" if rest > 0 else ""
    return f"parameter{'s' * (len(parameters) > 1)} {', '.join(parameters[:most])}{more}"
