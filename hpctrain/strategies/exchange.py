"""How gradients, or changes of parameters, get from worker to worker in a round.

Messages all-reduce the gradient arena, either whole (`MessageExchange`) or bucket by bucket, with a codec, while
backward still runs (`BucketExchange`); every worker owns all parameters. In `shared`, the ranks of a node share memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.replica.blocks import add_up, is_finite, sum_of_squares
from hpctrain.replica.layout import Stretch
from hpctrain.replica.state import Own
from hpctrain.replica.tensors import as_tensor
from hpctrain.strategies.contribution import nan_error, sum_error
from hpctrain.strategies.sums import StretchSums

if TYPE_CHECKING:
    from hpctrain.codecs.base import Codec
    from hpctrain.comm.base import Buffer, Communicator
    from hpctrain.errors import NanError
    from hpctrain.strategies.phase import Phase


class Exchange(ABC):
    """The exchange among the workers of a phase, or only those in `comm`. The constructor is collective over them.

    `low`, `high`: the stretch of the arena that this rank owns: `reduce` returns its mean, and this rank updates its
    parameters. `mean`: the last result of `reduce`. `bucket_bytes`: the size of the stretches that `start` takes; 0: it
    takes none.
    """

    low: int
    high: int
    mean: torch.Tensor
    bucket_bytes: int = 0
    _bad: int = 0  # 1 + the index of a parameter whose gradient is not finite and was about to be applied; 0: none

    def __init__(self, phase: Phase, comm: Communicator | None = None) -> None:
        self.phase, self.comm, self.replica = phase, comm or phase.worker_comm, phase.replica

    @property
    def peers(self) -> Communicator | None:
        """The workers that own the same stretch, among which `reduce` sums; None: there are no others."""
        return self.comm

    @property
    def island(self) -> Sequence[int]:
        """The workers, as ranks of `comm`, for all of which this one takes part in `reduce`; itself included."""
        return [self.comm.rank]

    @abstractmethod
    def synchronise(self) -> None:
        """Give all workers rank 0's parameters. Collective."""

    @abstractmethod
    def gather(self, row: Buffer) -> Buffer:
        """The rows of all workers, float64 of shape (workers, row.size), in rank order. Collective. Comes first in a
        round, when the gradients are in the arenas."""

    def begin(self, position: int, divisor: float) -> None:  # noqa: B027 (most need not know)
        """A round begins at that position of the run's clock; `reduce` will be given this divisor, as far as is known.
        May be called again in the same round. Not collective."""

    def own(self) -> Own:
        """This rank's own state, as `Strategy.own`."""
        return Own()

    def load_own(self, own: Own) -> str | None:
        """As `Strategy.load_own`; `own` may have more than what is the exchange's."""
        return None

    def start(self, low: int, high: int) -> None:  # noqa: B027 (most have nothing to start)
        """The stretch [low, high) of this rank's gradient is final. May start sending it; never waits."""

    def settle(self) -> None:  # noqa: B027 (most have started nothing)
        """Wait for what was started, when the round ends with an error instead. Collective."""

    def poll(self) -> None:  # noqa: B027 (most have started nothing)
        """Let what was started go on: MPI moves data only while some call is inside it. Never waits."""

    @abstractmethod
    def reduce(self, divisor: float) -> torch.Tensor:
        """The sum of all workers' gradient arenas over `divisor`, elements [low, high). Collective."""

    def check(self, gradient: torch.Tensor, at: int = 0) -> bool:
        """Whether `gradient`, elements of [low, high) that begin `at` elements after `low`, is finite and may be
        applied; if not, `publish` raises NanError. Not collective."""
        if gradient is not self.mean and not self._bad:  # `mean` was checked when it was summed
            self._note(gradient, is_finite(gradient), at)
        return not self._bad

    def _note(self, gradient: torch.Tensor, finite: bool, at: int = 0) -> None:
        self._bad = 0 if finite else self.replica.layout.first_not_finite(gradient, self.low + at)

    def _gradient_error(self, mine: int) -> NanError:
        """The error that names the rank and the parameter. `mine`: 1 + the index of the parameter whose gradient on
        this rank was not finite, or 0. Collective."""
        phase = self.phase
        table = self.comm.gather_rows(np.array([mine, self._bad], np.int64))
        guilty = np.flatnonzero(table[:, 0])
        if guilty.size:
            rank = phase.comm.members.index(self.comm.members[guilty[0]])
            return nan_error(phase, rank, 0.0, phase.step.number, int(table[guilty[0], 0]))
        return sum_error(phase, int(table[:, 1].max()), phase.step.number)

    def _arriving(self, sums: StretchSums, divisor: float) -> Iterator[Stretch]:
        """What `arrivals` yields, if `sums` sums `mean`."""
        self._bad = 0
        for low, high in sums.arrivals():
            part = self.mean[low:high]
            if not add_up([part], part, divisor) and not self._bad:
                self._bad = self.replica.layout.first_not_finite(part, self.low + low)
            yield self.low + low, self.low + high
        sums.divisor = sums.expected

    def arrivals(self, divisor: float) -> Iterator[Stretch]:
        """`reduce` in parts: yields stretches of the arena that together are [low, high), each once `mean` has its part
        there, while others may still be under way. The same stretches in the same order in every round. Collective, and
        to be exhausted."""
        self.reduce(divisor)
        yield self.low, self.high

    @abstractmethod
    def squares(self, part: torch.Tensor) -> float:
        """The squared norm of a vector of which `part` is this rank's stretch. Collective."""

    @abstractmethod
    def publish(self) -> None:
        """End the round: all ranks get the parameters that their owners updated. Collective.

        Raises NanError if the gradient to be applied was not finite.
        """

    @abstractmethod
    def stretches(self) -> list[tuple[int, int]]:
        """The stretch that each worker owns, in rank order."""

    def keepers(self) -> list[int]:
        """The workers whose stretches together cover the arena, rank 0 first."""
        return [0]

    @abstractmethod
    def free(self) -> None:
        """Free memory and communicators. Collective."""


class MessageExchange(Exchange):
    """All-reduces the whole gradient arena by messages, using `algorithm`; every worker owns all of it."""

    def __init__(self, phase: Phase, algorithm: str = "library", comm: Communicator | None = None) -> None:
        super().__init__(phase, comm)
        self._algorithm = algorithm
        self.low, self.high, self.mean = 0, self.replica.layout.length, self.replica.gradient

    def synchronise(self) -> None:
        if not self.phase.members.equal:
            self.comm.broadcast(self.replica.value_arena.mine)

    def gather(self, row: Buffer) -> Buffer:
        return self.comm.gather_rows(row)

    def reduce(self, divisor: float) -> torch.Tensor:
        self.comm.all_reduce(self.replica.gradient_arena.mine, algorithm=self._algorithm)
        self._note(self.mean, add_up([self.mean], self.mean, divisor))
        return self.mean

    def squares(self, part: torch.Tensor) -> float:
        return sum_of_squares(part)

    def publish(self) -> None:
        """All workers raise the same error, because all have the same sum."""
        if self._bad:
            raise sum_error(self.phase, self._bad, self.phase.step.number)

    def stretches(self) -> list[tuple[int, int]]:
        return [(self.low, self.high)] * self.comm.size

    def free(self) -> None:
        return None


class BucketExchange(MessageExchange):
    """All-reduces the gradient arena in buckets of `size` bytes, with a codec. `early`: each bucket is started as soon
    as backward has completed it."""

    def __init__(self, phase: Phase, codec: Codec, size: int, early: bool) -> None:
        super().__init__(phase)
        self.bucket_bytes = size if early else 0
        self.mean, slots = self._memory(), self.replica.layout.slots
        self._sums = StretchSums(self.comm, codec, self.mean, size // self.mean.element_size(), slots)

    def _memory(self) -> torch.Tensor:
        """What is summed."""
        return self.replica.gradient

    def begin(self, position: int, divisor: float) -> None:
        self._sums.begin(position, divisor)

    def own(self) -> Own:
        return self._sums.own()

    def load_own(self, own: Own) -> str | None:
        return self._sums.load_own(own)

    def start(self, low: int, high: int) -> None:
        self._sums.start(low, high)

    def poll(self) -> None:
        self._sums.poll()

    def gather(self, row: Buffer) -> Buffer:
        request, table = self.comm.start_gather_rows(row)
        self._sums.wait_for(request)
        return table

    def settle(self) -> None:
        self._sums.finish()

    def reduce(self, divisor: float) -> torch.Tensor:
        for _ in self.arrivals(divisor):
            pass
        return self.mean

    def arrivals(self, divisor: float) -> Iterator[Stretch]:
        if not self.bucket_bytes:
            self._sums.expected = divisor
            self._sums.start(self.low, self.high)
        return self._arriving(self._sums, divisor)

    def publish(self) -> None:
        if self.bucket_bytes:
            self.settle()  # buckets were started, but the round was skipped
        if self._bad and self._sums.rest is not None:  # has what the sum may have lost: where which rank's gradient is
            raise self._gradient_error(self.replica.layout.first_not_finite(self._sums.rest))
        super().publish()

    def free(self) -> None:
        self._sums.free()


class ApartExchange(BucketExchange):
    """The same for values that the strategy writes into `mean`, which is memory of its own: gradients can be computed
    while they are on their way."""

    def _memory(self) -> torch.Tensor:
        length, dtype = self.replica.layout.length, self.replica.layout.dtype
        self._arena = self.comm.arena(length, dtype)
        return as_tensor(self._arena.mine)

    def free(self) -> None:
        super().free()
        self._arena.free()
