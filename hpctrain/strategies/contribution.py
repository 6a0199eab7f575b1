"""One row of numbers from each worker in each round, and the totals of all rows, the same for every rank.

The rank that closes a round (every worker of an all-reduce, the coordinator of a parameter server) adds up the rows:
the number of samples, the mean loss, whether the gradients may be applied, and which parameters have one.
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

_NUMBERS = 6
_BITS = 32  # bits in a word; a float64 holds a word exactly


@dataclass(frozen=True)
class Contribution:
    """One worker's part in a round. On the wire it is a row of float64.

    `weight`: what the mean loss is taken over (samples, unless the loss says otherwise). `bad`: as in `StepState`.
    `used`: see `Used`. `seconds`: as in `StepState`.
    """

    samples: int
    weight: float
    loss: float
    wish: Ask
    bad: int = 0
    used: Used = None
    seconds: float = 0.0

    @classmethod
    def of(cls, phase: Phase, samples: int, loss: float) -> Contribution:
        """This worker's contribution from the step that it has just computed."""
        weight = float(samples) if phase.step.weight is None else phase.step.weight
        used = phase.replica.used() if samples else np.zeros(len(phase.replica.layout.slots), np.bool_)
        seconds = phase.step.seconds if samples else 0.0
        return cls(samples, weight, loss if samples else 0.0, phase.step.wish, phase.step.bad, used, seconds)

    @classmethod
    def nothing(cls, wish: Ask, slots: int) -> Contribution:
        """The contribution of a worker whose step does not count."""
        return cls(0, 0.0, 0.0, wish, 0, np.zeros(slots, np.bool_))

    @classmethod
    def sum_of(cls, parts: Sequence[Contribution]) -> Contribution:
        """The sum of several steps of one worker."""
        whole = RoundTotals.of(parts)
        seconds = sum(part.seconds for part in parts)
        return cls(whole.samples, whole.weight, whole.loss, whole.wish, 0, whole.used, seconds)

    @staticmethod
    def length(slots: int) -> int:
        """Number of elements of an encoded contribution, for a layout of `slots` parameters."""
        return _NUMBERS + words(slots)

    def encode(self, slots: int) -> Buffer:
        """Encode as float64: the numbers, then one bit for each parameter."""
        numbers = [self.samples, self.weight, self.loss, float(self.wish), self.bad, self.seconds]
        return np.concatenate([np.array(numbers, np.float64), pack(self.used, slots)])

    @classmethod
    def decode(cls, row: Buffer, slots: int) -> Contribution:
        """The inverse of `encode`."""
        samples, weight, loss, wish, bad, seconds = row[:_NUMBERS].tolist()
        return cls(int(samples), weight, loss, Ask(int(wish)), int(bad), unpack(row[_NUMBERS:], slots), seconds)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite, as far as the worker has checked."""
        return self.loss - self.loss == 0.0 and not self.bad

    @property
    def overflow(self) -> bool:
        """Whether the gradient is not finite because of the loss scale: the step is skipped, whatever train.nan is."""
        return self.bad < 0

    @property
    def faulty(self) -> bool:
        """Whether loss or gradient are not finite for any other reason: train.nan applies."""
        return not self.finite and not self.overflow


@dataclass(frozen=True)
class RoundTotals:
    """The totals of all contributions.

    `loss`: the mean over the round's weight. `used`: the parameters that any worker's loss depends on; the optimizer
    does not change the others, as in torch for parameters without a gradient. `faulty`: index of the first contribution
    whose loss or gradient is not finite, or None. `overflow`: any gradient overflowed under the loss scale, which is
    not a fault.
    """

    samples: int
    weight: float
    loss: float
    wish: Ask
    used: Used
    faulty: int | None
    overflow: bool = False

    @classmethod
    def of(cls, parts: Sequence[Contribution]) -> RoundTotals:
        """The totals of contributions in rank order."""
        numbers = [[part.samples, part.weight, part.loss, float(part.wish), part.bad] for part in parts]
        used = [part.used for part in parts if part.used is not None]
        everything = len(used) < len(parts)
        return cls._of(np.array(numbers, np.float64), None if everything else np.asarray(np.array(used).any(axis=0)))

    @classmethod
    def of_rows(cls, table: Buffer, slots: int) -> RoundTotals:
        """The same of encoded contributions, one per row, without decoding each: there may be thousands."""
        bits = np.unpackbits(table[:, _NUMBERS:].astype(np.uint32).view(np.uint8), axis=1)[:, :slots]
        everything = bool(bits.all(axis=1).any())
        return cls._of(table[:, :_NUMBERS], None if everything else np.asarray(bits.any(axis=0)))

    @classmethod
    def _of(cls, numbers: Buffer, used: Used) -> RoundTotals:
        """`numbers`: the first columns of encoded contributions."""
        weights, losses, bad = numbers[:, 1], numbers[:, 2], numbers[:, 4]
        weight = float(weights.sum())
        wish = Ask(int(np.bitwise_or.reduce(numbers[:, 3].astype(np.int64))))
        overflow = bad < 0
        faulty = np.flatnonzero(~(np.isfinite(losses) & (bad == 0)) & ~overflow)
        mean = float((weights * losses).sum()) / weight if weight else 0.0
        first = int(faulty[0]) if faulty.size else None
        return cls(int(numbers[:, 0].sum()), weight, mean, wish, used, first, bool(overflow.any()))

    @property
    def skip(self) -> bool:
        """Whether to make no update: something is not finite, or all workers have left the training loop."""
        return self.faulty is not None or self.overflow or not self.samples

    def divisor(self, batch: int) -> float:
        """The divisor of the sum of the gradients, which are already divided by `batch`. Where no target counts, the
        weight and the gradients are 0; they stay so, and the optimizer does what torch's does with zeros."""
        return self.weight / batch or 1.0


def measured_in(table: Buffer) -> tuple[list[int], list[float]]:
    """The samples of each worker, and the seconds that it computed them in, from encoded contributions."""
    return table[:, 0].astype(np.int64).tolist(), table[:, _NUMBERS - 1].tolist()


def nan_error(phase: Phase, rank: int, loss: float, step: int, bad: int = 0) -> NanError:
    """The error that all ranks raise if a worker's loss or gradient (`bad`: as in `Contribution`) is not finite. `rank`
    is a rank of the phase's communicator."""
    where = f"on rank {phase.comm.members[rank]} in step {step} (phase {phase.index})"
    if loss - loss != 0.0 or not bad:
        cure = 'lower optimizer.lr, clip with train.clip_norm, or set train.nan = "skip" to leave such steps out'
        return _everywhere(f"loss is {loss} {where}; {cure}")
    return _everywhere(f"{_gradient_of(phase, bad)} is not finite {where}, though the loss is; {_LOOK}")


def sum_error(phase: Phase, bad: int, step: int) -> NanError:
    """The same error if only the sum of the workers' gradients was checked, or only the sum is not finite."""
    where = f"in step {step} (phase {phase.index})"
    return _everywhere(f"{_gradient_of(phase, bad)}, summed over the workers, is not finite {where}; {_LOOK}")


_LOOK = (
    "check for a division by 0 or the square root of 0, lower optimizer.lr, or set "
    'train.nan = "skip" to leave such steps out'
)


def _gradient_of(phase: Phase, bad: int) -> str:
    return f"the gradient of parameter {phase.replica.layout.slots[bad - 1].name}"


def _everywhere(text: str) -> NanError:
    error = NanError(text)
    error.everywhere = True
    return error


def words(slots: int) -> int:
    """Number of float64 values that hold one bit for each of `slots` parameters."""
    return -(-slots // _BITS)


def pack(used: Used, slots: int) -> Buffer:
    """Pack one bit per parameter into float64 words."""
    bits = np.zeros(words(slots) * _BITS, np.bool_)
    bits[:slots] = True if used is None else used
    return np.packbits(bits).view(np.uint32).astype(np.float64)


def unpack(row: Buffer, slots: int) -> Used:
    """The inverse of `pack`."""
    bits = np.unpackbits(np.asarray(row).astype(np.uint32).view(np.uint8))[:slots].astype(np.bool_)
    return None if bits.all() else bits
