"""One row of numbers from each worker in each round, and what all rows add up to, alike for everybody.

Whoever closes a round (every worker of an all-reduce, the coordinator of a parameter server) adds the rows up: its
samples, its mean loss, whether its gradients may be applied, and which parameters they are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpctrain.clock.decisions import Ask
from hpctrain.errors import NanError

if TYPE_CHECKING:
    from hpctrain.comm.base import Buffer
    from hpctrain.strategies.phase import Phase

Used = NDArray[np.bool_] | None
"""Which of the layout's parameters the loss depends on, in its order; None: all of them."""

_NUMBERS = 5
_BITS = 32  # a word, which a float64 holds exactly


@dataclass(frozen=True)
class Contribution:
    """One worker's part in a round, as it goes over the wire: a row of float64.

    `weight`: what the mean loss is taken over (samples, unless the loss says otherwise). `bad`: 1 + the index of a
    parameter whose gradient is not finite, 0 if none was found. `used`: see `Used`.
    """

    samples: int
    weight: float
    loss: float
    wish: Ask
    bad: int = 0
    used: Used = None

    @classmethod
    def of(cls, phase: Phase, samples: int, loss: float) -> Contribution:
        """This worker's, of the step that it has just computed."""
        weight = float(samples) if phase.step.weight is None else phase.step.weight
        used = phase.replica.used() if samples else np.zeros(len(phase.replica.layout.slots), np.bool_)
        return cls(samples, weight, loss if samples else 0.0, phase.step.wish, phase.step.bad, used)

    @classmethod
    def nothing(cls, wish: Ask, slots: int) -> Contribution:
        """Of a worker whose step counts for nothing."""
        return cls(0, 0.0, 0.0, wish, 0, np.zeros(slots, np.bool_))

    @classmethod
    def sum_of(cls, parts: Sequence[Contribution]) -> Contribution:
        """One worker's several steps as one."""
        whole = RoundTotals.of(parts)
        return cls(whole.samples, whole.weight, whole.loss, whole.wish, 0, whole.used)

    @staticmethod
    def length(slots: int) -> int:
        """Elements of an encoded contribution, for a layout of `slots` parameters."""
        return _NUMBERS + words(slots)

    def encode(self, slots: int) -> Buffer:
        """As float64: its numbers, then a bit for each parameter."""
        numbers = [self.samples, self.weight, self.loss, float(self.wish), self.bad]
        return np.concatenate([np.array(numbers, np.float64), pack(self.used, slots)])

    @classmethod
    def decode(cls, row: Buffer, slots: int) -> Contribution:
        """The inverse of `encode`."""
        samples, weight, loss, wish, bad = row[:_NUMBERS].tolist()
        return cls(int(samples), weight, loss, Ask(int(wish)), int(bad), unpack(row[_NUMBERS:], slots))

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are, as far as the worker has looked."""
        return self.loss - self.loss == 0.0 and not self.bad


@dataclass(frozen=True)
class RoundTotals:
    """What all contributions add up to.

    `loss`: the mean over the round's weight. `used`: the parameters that any worker's loss depends on; the optimizer
    leaves the others alone, as torch does where there is no gradient. `faulty`: the first worker (its place among the
    contributions) whose loss or gradient is not finite, else None.
    """

    samples: int
    weight: float
    loss: float
    wish: Ask
    used: Used
    faulty: int | None

    @classmethod
    def of(cls, parts: Sequence[Contribution]) -> RoundTotals:
        """Of the contributions in rank order."""
        weights = np.array([part.weight for part in parts])
        losses = np.array([part.loss for part in parts])
        weight = float(weights.sum())
        wish = Ask(int(np.bitwise_or.reduce([int(part.wish) for part in parts])))
        used = [part.used for part in parts if part.used is not None]
        everything = len(used) < len(parts)
        union = None if everything else np.logical_or.reduce(used)
        faulty = next((index for index, part in enumerate(parts) if not part.finite), None)
        mean = float((weights * losses).sum()) / weight if weight else 0.0
        samples = sum(part.samples for part in parts)
        return cls(samples, weight, mean, wish, union, faulty)

    @property
    def skip(self) -> bool:
        """Whether no update comes of it: something is not finite, or all workers have left the training loop."""
        return self.faulty is not None or not self.samples

    def divisor(self, batch: int) -> float:
        """What the sum of the gradients is divided by; they come divided by `batch`. Where nothing counts they are 0
        and stay so: the optimizer makes of that what torch's does."""
        return self.weight / batch or 1.0


def nan_error(phase: Phase, rank: int, loss: float, step: int, bad: int = 0) -> NanError:
    """The error for all ranks to raise where a worker's loss is not finite, or its gradient (`bad`: as in
    `Contribution`). `rank` is of the phase's communicator."""
    where = f"on rank {phase.comm.members[rank]} in step {step} (phase {phase.index})"
    if loss - loss != 0.0 or not bad:
        cure = 'lower optimizer.lr, clip with train.clip_norm, or set train.nan = "skip" to leave such steps out'
        return _everywhere(f"loss is {loss} {where}; {cure}")
    return _everywhere(f"{_gradient_of(phase, bad)} is not finite {where}, though the loss is; {_LOOK}")


def sum_error(phase: Phase, bad: int, step: int) -> NanError:
    """The same where only the sum of the workers' gradients was looked at, or nothing but the sum is not finite."""
    where = f"in step {step} (phase {phase.index})"
    return _everywhere(f"{_gradient_of(phase, bad)}, summed over the workers, is not finite {where}; {_LOOK}")


_LOOK = (
    "look for a division by 0 or the root of 0 behind it, lower optimizer.lr, or set "
    'train.nan = "skip" to leave such steps out'
)


def _gradient_of(phase: Phase, bad: int) -> str:
    return f"the gradient of parameter {phase.replica.layout.slots[bad - 1].name}"


def _everywhere(text: str) -> NanError:
    error = NanError(text)
    error.everywhere = True
    return error


def words(slots: int) -> int:
    """How many float64 values hold one bit for each of `slots` parameters."""
    return -(-slots // _BITS)


def pack(used: Used, slots: int) -> Buffer:
    """A bit for each parameter, in float64 words."""
    bits = np.zeros(words(slots) * _BITS, np.bool_)
    bits[:slots] = True if used is None else used
    return np.packbits(bits).view(np.uint32).astype(np.float64)


def unpack(row: Buffer, slots: int) -> Used:
    """The inverse of `pack`."""
    bits = np.unpackbits(np.asarray(row).astype(np.uint32).view(np.uint8))[:slots].astype(np.bool_)
    return None if bits.all() else bits
