"""Forward and backward passes in virtual time: what they cost, and when backward completes which gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.scheduler import Scheduler
from hpctrain.hosts import Host
from hpctrain.replica.coupling import Coupling
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.cores import Cores

if TYPE_CHECKING:
    from hpctrain.replica.replica import Replica


NOTICING = 1e-9  # seconds


class Spells:
    """When a host is slow: spells of `for_s` seconds, one in every stretch of `every_s`, at a random place in it."""

    def __init__(self, host: Host, seed: int) -> None:
        self._slow, self._seed, self._number = host.slow, seed, host.number

    def factor(self, now: int) -> float:
        """How many times slower the host computes at that virtual time (nanoseconds)."""
        if self._slow is None:
            return 1.0
        stretch = int(now / 1e9 / self._slow.every_s)
        draw = random.Random(f"{self._seed}/{self._number}/{stretch}").random()
        begin = (stretch + draw * (1 - self._slow.for_s / self._slow.every_s)) * self._slow.every_s
        return self._slow.factor if begin <= now / 1e9 < begin + self._slow.for_s else 1.0


class Processor:
    """What a virtual rank computes with: its host's cores, or an accelerator of its own.

    A piece of work takes its cost over the host's speed, times a factor that is drawn for each pass: log-normal, with
    mean 1 and the spread that was measured and the host's jitter together.
    """

    def __init__(self, world: Scheduler, host: Host, cores: Cores, spells: Spells, seed: int, rank: int) -> None:
        self._world, self._host, self._cores, self._spells = world, host, cores, spells
        self._random = random.Random(f"{seed}/{rank}")
        self._luck, self._passes = 1.0, False
        self._owed = 0.0  # seconds of the host's cores, for messages

    def draw(self, spread: float) -> None:
        """A new pass begins, with a time that varies by that much, relative."""
        self._luck, self._passes = self._drawn(spread), True

    def _drawn(self, spread: float) -> float:
        sigma = math.hypot(math.sqrt(math.log1p(spread**2)), self._host.jitter)
        return self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else 1.0

    def serve(self, seconds: float) -> None:
        """The same for work besides passes. Where there are none, as on a server, it has its own factor."""
        if not self._passes:
            self._luck = self._drawn(0.0)
        self.work(seconds)

    def work(self, seconds: float) -> None:
        """Compute for that long, as measured on one whole core of the calibrated machine."""
        here = (seconds * self._luck + self._owed) * self._spells.factor(self._world.time) / self._host.speed
        self._owed = 0.0
        if here > 0:
            self._cores.work(here * 1e9)

    def owe(self, seconds: float) -> None:
        """Handle messages for that long, as soon as possible. Beside an accelerator, a core of the host does it."""
        if not self._host.devices:
            self._owed += seconds

    def waited(self, since: int, polling: float) -> None:
        """The rank has waited since then, and has handled messages meanwhile. `polling`: the share of a core that it
        has used for that. Returns when it goes on, which is later if its host's quota is used up."""
        elapsed = (self._world.time - since) / 1e9
        handled = min(elapsed, self._owed / self._host.speed)
        self._owed = self._owed - handled * self._host.speed if handled == elapsed else 0.0
        self._cores.used(min(elapsed, polling * elapsed + handled) * 1e9, since)
        if self._owed or self._cores.stopped:
            self.work(NOTICING)


class TimedPasses(Coupling):
    """Lets virtual time pass in a worker's passes. Gradients become complete while it passes: in the order and at the
    shares of the pass that were measured.

    `inner`: the job's own coupling, which really computes; None: nothing is computed.
    """

    def __init__(
        self,
        calibration: Calibration,
        processor: Processor,
        replica: Replica,
        inner: Coupling | None,
    ) -> None:
        self._calibration = calibration
        self._processor, self._replica = processor, replica
        self._computes, self._inner = inner is not None, inner or Coupling()
        self._samples = 0

    def forward(self, samples: int) -> None:
        """A forward pass over that many samples, with getting them and what a step costs besides its spans."""
        known, self._samples = self._calibration, samples
        self._processor.owe(known.handling.step_s)
        self._processor.draw(known.model.forward.spread)
        data = known.span("data").seconds(samples)
        self._processor.work(known.model.forward.seconds(samples) + known.step.seconds(0) + data)

    def backward(self, loss: Tensor) -> None:
        """See `Coupling`. What the pass costs passes before each gradient is announced, or at once if nobody waits for
        single gradients."""
        model, replica = self._calibration.model, self._replica
        complete = model.order
        if self._computes:
            with replica.held() as found:
                self._inner.backward(loss)
            self.waited = self._inner.waited
            complete = [index for index in model.order if index in found]
            complete += [index for index in found if index not in model.order]
        seconds = model.backward.seconds(self._samples)
        shares = dict(zip(model.order, model.shares, strict=True)) if replica.heard else {}
        if not shares:
            self._processor.work(seconds)
        for index in complete:
            if share := shares.get(index, 0.0):
                self._processor.work(seconds * share)
            replica.accumulated(index)

    # -- as the job's own ------------------------------------------------------------------------------------
    def join(self, workers: Communicator) -> None:
        self._inner.join(workers)

    def idle(self, batches: Iterable[int], own: int) -> int:
        return self._inner.idle(batches, own)

    def before(self, counts: bool) -> None:
        self._inner.before(counts)
        self.waited = self._inner.waited

    def leave(self) -> None:
        self._inner.leave()

    def restore(self) -> None:
        self._inner.restore()
