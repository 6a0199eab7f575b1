"""Fair load: workers get shares of the work that follow their measured speeds (`balance = "throughput"`).

Pure: no torch, no communicator, no clock. Every rank that keeps a `Balance` gives it the same numbers, so all of them
have the same shares at the same time. Where workers take every step together, batch sizes change and the global batch
stays (`BatchBalance`: LB-BSP, Chen et al. 2020; OmniLearn, Tyagi and Sharma 2025): gradients are weighted by samples,
so the result does not depend on the shares. Where workers train by themselves for a round, slower ones take fewer steps
(`StepBalance`: dynamic local updates, Liu et al. 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal

from hpctrain.trace.events import SharesChanged

Shares = tuple[int, ...]  # samples, at most, of each worker in one step
BalanceChoice = Literal["none", "throughput"]
BALANCE = "balance"  # key of the state among a strategy's counters
BATCHES_TEXT = (
    "how a round's samples are divided. none: evenly; throughput: in proportion to the workers' measured speeds, so "
    "that all take equally long. A round has as many samples as without, but a worker's batch may have twice "
    "train.batch_size: leave memory for it"
)
STEPS_TEXT = (
    "how many steps each worker takes in a round. none: all take the same number; throughput: in proportion to their "
    "measured speeds, so that all take equally long, and the fastest `every`, so that a round has fewer samples "
    "(dynamic local updates)"
)

FEWEST, MOST = 5, 40  # steps measured before a decision: the former at first, then twice as many each time
WORTHWHILE = 1.05  # how many times as fast a round must become for shares to change
LARGE = 1.25  # such a gain after shares that were right means that speeds have changed: decide early again
LATE = 5  # one measurement in five, the slowest, is left out
GROWTH = 2  # a batch has at most this many times the samples of an equal share: memory is limited
PART = 16  # and at least that part of it, so that a worker that has been slow is still measured
PAIR = 2  # samples, because batch norm cannot train on one


class Balance(ABC):
    """The shares of the workers, in rank order, and the controller that changes them.

    It compares the means of the seconds per sample that workers measured in a few rounds, without the slowest fifth: a
    round that was delayed once does not count, but a processor that is taken away now and then does. `ranks`: of the
    workers, for messages; `batch`: samples per worker and step with equal shares.
    """

    unit: ClassVar[str]  # of the loads

    def __init__(self, ranks: Sequence[int], batch: int) -> None:
        self.ranks, self.batch = tuple(ranks), batch
        self._window, self._settled = FEWEST, False
        self._restart()

    @abstractmethod
    def deal(self, index: int, length: int) -> tuple[Shares, Shares]:
        """The shares in step `index` of a round of `length` steps, and in the step after it."""

    @abstractmethod
    def loads(self, length: int) -> list[int]:
        """How much each worker does in a round of `length` steps, in `unit`."""

    @abstractmethod
    def _proposed(self, speeds: Sequence[float], length: int) -> list[int]:
        """The loads that fit these speeds (samples per second)."""

    @abstractmethod
    def _adopt(self, loads: list[int], length: int) -> None:
        """Use these loads as soon as possible."""

    def _advance(self) -> bool:
        """Go on to the next round. Returns whether the one that has ended had the latest loads."""
        return True

    def observe(self, samples: Sequence[int], seconds: Sequence[float], length: int = 1) -> SharesChanged | None:
        """A round of `length` steps has ended, in which each worker computed `samples` in `seconds`, without waiting.
        Returns the decision if the loads change."""
        if not self._advance():
            return None
        for paces, count, taken in zip(self._paces, samples, seconds, strict=True):
            if count and taken > 0:
                paces.append(taken / count)
        self._rounds += 1
        if self._rounds < max(2, -(-self._window // length)):
            return None
        found = [_typical(paces) if paces else 0.0 for paces in self._paces]
        self._restart()
        return self._decision(found, length) if all(found) else None

    def _decision(self, pace: Sequence[float], length: int) -> SharesChanged | None:
        """Decide by the seconds per sample of each worker."""
        before = self.loads(length)
        after = self._proposed([1 / each for each in pace], length)
        times = [each * load for each, load in zip(pace, before, strict=True)]
        gain = _throughput(pace, after) / _throughput(pace, before)
        self._window = FEWEST if gain > LARGE and self._settled else min(2 * self._window, MOST)
        self._settled = gain <= WORTHWHILE
        if self._settled:
            return None
        self._adopt(after, length)
        slowest = self.ranks[times.index(max(times))]
        excess = max(times) * len(times) / sum(times)
        return SharesChanged(self.unit, _listed(before), _listed(after), slowest, round(excess, 3), round(gain, 3))

    def _restart(self) -> None:
        """Forget what was measured."""
        self._paces: list[list[float]] = [[] for _ in self.ranks]
        self._rounds = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves; plain values."""
        return {"window": self._window, "settled": self._settled, "rounds": self._rounds, "paces": self._paces}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state` on as many workers."""
        self._window, self._settled = int(state["window"]), bool(state["settled"])
        self._rounds = int(state["rounds"])
        self._paces = [list(paces) for paces in state["paces"]]


class BatchBalance(Balance):
    """Workers take every step together: their batch sizes change, and the samples of a round stay the same.

    A decision comes into force one round later, because the next round's samples may already be on their way.
    """

    unit = "samples per step"

    def __init__(self, ranks: Sequence[int], batch: int) -> None:
        super().__init__(ranks, batch)
        self._now = self._later = [batch] * len(self.ranks)

    def deal(self, index: int, length: int) -> tuple[Shares, Shares]:
        return tuple(self._now), tuple(self._later)

    def loads(self, length: int) -> list[int]:
        return self._now

    def _proposed(self, speeds: Sequence[float], length: int) -> list[int]:
        least = min(self.batch, max(PAIR, self.batch // PART))
        return apportioned(self.batch * len(speeds), speeds, least, GROWTH * self.batch)

    def _adopt(self, loads: list[int], length: int) -> None:
        self._later = loads

    def _advance(self) -> bool:
        latest = self._now == self._later
        self._now = self._later
        return latest

    def state(self) -> dict[str, Any]:
        return {**super().state(), "now": self._now, "later": self._later}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._now, self._later = list(state["now"]), list(state["later"])


class StepBalance(Balance):
    """Workers train by themselves for a round: the fastest takes all of its steps, and slower ones fewer, at least one.
    In the steps that they do not take they have no samples."""

    unit = "steps per round"

    def __init__(self, ranks: Sequence[int], batch: int) -> None:
        super().__init__(ranks, batch)
        self._parts = [1.0] * len(self.ranks)  # of a round's steps

    def deal(self, index: int, length: int) -> tuple[Shares, Shares]:
        loads = self.loads(length)
        return self._share(loads, index), self._share(loads, (index + 1) % length)

    def _share(self, loads: list[int], index: int) -> Shares:
        return tuple(self.batch if index < load else 0 for load in loads)

    def loads(self, length: int) -> list[int]:
        return [max(1, int(part * length + 1e-9)) for part in self._parts]  # 15 / 22 * 22 is slightly less than 15

    def _proposed(self, speeds: Sequence[float], length: int) -> list[int]:
        return [max(1, int(part * length)) for part in _relative(speeds)]

    def _adopt(self, loads: list[int], length: int) -> None:
        self._parts = [load / length for load in loads]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "parts": self._parts}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._parts = list(state["parts"])


def _typical(paces: Sequence[float]) -> float:
    """The mean without the slowest."""
    return fmean(sorted(paces)[: len(paces) - len(paces) // LATE])


def _relative(speeds: Sequence[float]) -> list[float]:
    """Each speed over the largest; 1 for those that are nearly as fast."""
    return [min(1.0, WORTHWHILE * speed / max(speeds)) for speed in speeds]


def _throughput(pace: Sequence[float], loads: Sequence[int]) -> float:
    """Work per second of a round that ends with its last worker; `pace`: seconds per unit of work."""
    return sum(loads) / max(each * load for each, load in zip(pace, loads, strict=True))


def apportioned(total: int, weights: Sequence[float], least: int, most: int) -> list[int]:
    """`total` divided in proportion to positive `weights`, each part an integer of [least, most]: what the limits take
    from one is divided among the others. The parts sum to `total`, which must be possible."""
    low, high = 0.0, most / min(weights)
    for _ in range(100):  # the parts grow with the factor, so bisection finds it
        factor = (low + high) / 2
        if sum(_limited(weights, factor, least, most)) < total:
            low = factor
        else:
            high = factor
    exact = _limited(weights, high, least, most)
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda index: (parts[index] - exact[index], index))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _limited(weights: Sequence[float], factor: float, least: int, most: int) -> list[float]:
    return [min(max(weight * factor, least), most) for weight in weights]


def _listed(loads: Sequence[int]) -> str:
    """For a message: all loads if they are few, else their range."""
    return " ".join(map(str, loads)) if len(loads) <= 16 else f"{min(loads)} to {max(loads)}"
