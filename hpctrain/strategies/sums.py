"""Sums of stretches of an arena over ranks, several under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from hpctrain.codecs.base import Addend, Codec

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator, Request

LOOKS = 64  # at open messages, per call of `poll`: MPI moves only a part of a long message (about 64 KiB) in each


class UnderWay(NamedTuple):
    """A sum in one of its stages."""

    rest: Iterator[list[Request]]
    requests: list[Request]  # those of this stage that may not be over yet

    def over(self) -> bool:
        """Whether the stage is over; never waits."""
        while self.requests and self.requests[-1].test():
            self.requests.pop()
        return not self.requests


class StretchSums:
    """Sums stretches of `values` over the ranks of `comm` with a codec, in place.

    All ranks must start the same stretches in the same order. Stages begin in that order, too, so their order
    alone identifies the messages. The constructor is collective.
    """

    def __init__(self, comm: Communicator, codec: Codec, values: Tensor) -> None:
        own = comm.split(0, comm.rank)
        assert own is not None
        self._comm, self._codec, self._values = own, codec, values
        self._addends: dict[tuple[int, int], Addend] = {}
        self._stages: list[deque[UnderWay]] = [deque() for _ in range(codec.stages)]

    def __len__(self) -> int:
        """How many sums are under way."""
        return sum(map(len, self._stages))

    def start(self, low: int, high: int, position: int = 0) -> None:
        """Start the sum of values[low:high]; never waits. `position`: see `Codec.position`."""
        self._codec.position = position
        if (low, high) not in self._addends:
            self._addends[low, high] = Addend(self._comm, self._values[low:high])
        self._enter(0, self._codec.reduce(self._addends[low, high]))

    def poll(self) -> None:
        """Let what was started go on: MPI moves data only while some call is inside it. Never waits."""
        looks = LOOKS if self._comm.concurrent else 1
        while looks and self._advance():
            looks -= 1

    def finish(self) -> None:
        """Wait until all that was started is summed."""
        while heads := self._advance():
            if len(heads) == 1:  # the wait is then recorded as that operation's own
                heads[0].requests[-1].wait()
            else:
                self._comm.wait_any([head.requests[-1] for head in heads])

    def _advance(self) -> list[UnderWay]:
        """Let every sum enter its next stage that may. Returns the sums that come next in each stage."""
        for number, stage in enumerate(self._stages):
            while stage and stage[0].over():
                self._enter(number + 1, stage.popleft().rest)
        return [stage[0] for stage in self._stages if stage]

    def _enter(self, number: int, rest: Iterator[list[Request]]) -> None:
        requests = next(rest, None)
        if requests is not None:
            self._stages[number].append(UnderWay(rest, requests))

    def free(self) -> None:
        """Free the communicator, after `finish`. Collective."""
        self._addends = {}
        self._comm.free()
