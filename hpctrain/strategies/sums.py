"""Sums of stretches of an arena over ranks, in pieces, several of which are under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hpctrain.codecs.base import Addend, Codec
from hpctrain.codecs.joint import JointCodec, WholeParameters
from hpctrain.codecs.wire import WireCodec, wide_dtype
from hpctrain.replica.layout import NUMPY_DTYPES, Slot, Stretch, stretches_of
from hpctrain.replica.state import CODEC, MEMORY, REST, Own
from hpctrain.replica.tensors import as_array, as_tensor

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator, Request

LOOKS = 64  # at open messages, per call of `poll`: MPI moves only a part of a long message (about 64 KiB) in each
MOVED = (
    "what the codec's messages had left out is lost, because the run resumes on other nodes or with another exchange"
)
OTHER = "what the codec's messages had left out is lost, because the run resumes with a codec that keeps something else"
FEWEST, MOST = 4, 16  # pieces under way: at first, and where the network was found idle


@dataclass(slots=True)
class UnderWay:
    """The sum of a piece, in one of its stages."""

    piece: Stretch
    rest: Iterator[list[Request]]
    requests: list[Request]  # those of this stage that may not be over yet

    def over(self) -> bool:
        """Whether the stage is over; never waits."""
        while self.requests and self.requests[-1].test():
            self.requests.pop()
        return not self.requests


class StretchSums:
    """Sums stretches of `values` over the ranks of `comm` with a codec, in place, in pieces of at most `size` elements.
    `low`: where `values` begin in the arena.

    Only some pieces are under way at once, because a rank's other messages wait behind them, and so that queues in the
    network do not overflow. There are more if all were over before this rank looked again.

    What messages of a codec that remembers have left out is kept for the next ones, in units of the mean: the sums of
    a short round are divided by less. `rest`: that, or None; `expected`: what the sums that are started now will be
    divided by, as far as is known, and `divisor`: what was expected of the latest ones. Only their ratio counts.

    A JointCodec also needs `slots`, the parameters in `values`. Pieces are then cut between these, and may be longer.

    All ranks must start the same stretches in the same order. Pieces and their stages begin in that order, too, so
    their order alone identifies the messages. The constructor is collective.
    """

    def __init__(
        self,
        comm: Communicator,
        codec: Codec,
        values: Tensor,
        size: int,
        slots: Sequence[Slot] = (),
        low: int = 0,
    ) -> None:
        own = comm.split(0, comm.rank)
        assert own is not None
        self._comm, self._codec, self._values = own.patient(), codec, values
        self._size = max(size, codec.unit) // codec.unit * codec.unit
        remembers = codec.remembers and own.size > 1
        self.rest = as_tensor(own.arena(values.numel(), NUMPY_DTYPES[values.dtype]).mine) if remembers else None
        self._kept: dict[str, Tensor] = {}
        if remembers and isinstance(codec, WireCodec):
            wide = NUMPY_DTYPES[wide_dtype(values)]
            self._kept = {name: as_tensor(own.arena(values.numel(), wide).mine) for name in codec.feedback.keeps}
        self._begun = False  # whether these are of an earlier run
        self._whole: WholeParameters | None = None
        if isinstance(codec, JointCodec) and own.size > 1:
            self._whole = WholeParameters(self._comm, codec, values, slots)
        self.divisor = self.expected = 1.0
        self._low = low
        self._addends: dict[Stretch, Addend] = {}
        self._due: deque[Stretch] = deque()  # pieces that have not begun
        self._stages: list[deque[UnderWay]] = [deque() for _ in range(codec.stages)]
        self._over: deque[Stretch] = deque()  # pieces that `arrivals` has yet to yield
        self._most = FEWEST

    def __len__(self) -> int:
        """How many pieces are not summed yet."""
        return len(self._due) + self._under_way()

    def begin(self, position: int, expected: float) -> None:
        """A round begins. `position`: see `Codec.position`."""
        self._codec.position, self.expected = position, expected

    def own(self) -> Own:
        """What this rank's messages have left out so far, and what its codec remembers; views. Not collective."""
        own = Own({f"{CODEC}{name}": as_array(array) for name, array in self._kept.items()})
        if self.rest is not None:
            own.arrays[REST], own.numbers[REST] = as_array(self.rest), {"divisor": self.divisor, "low": self._low}
        if self._whole is not None:
            own.arrays[MEMORY], own.numbers[MEMORY] = as_array(self._whole.memory), {"numbers": self._whole.numbers}
        return own

    def load_own(self, own: Own) -> str | None:
        """Continue from the result of `own`, if it is of the same stretch of the arena. Returns why not. Not
        collective."""
        if self.rest is None or REST not in own.arrays:
            return None
        kept, about = own.arrays[REST], own.numbers[REST]
        if kept.size != self.rest.numel() or about["low"] != self._low:
            return MOVED
        arrays = {f"{CODEC}{name}": array for name, array in self._kept.items()}
        if arrays.keys() != {name for name in own.arrays if name.startswith(CODEC)} - {REST, MEMORY}:
            return OTHER
        for name, array in arrays.items():
            array.copy_(as_tensor(own.arrays[name]))
        self.rest.copy_(as_tensor(kept))
        self._begun = True
        self.divisor = about["divisor"]
        if self._whole is not None and MEMORY in own.arrays:
            self._whole.load(own.arrays[MEMORY], own.numbers[MEMORY]["numbers"])
        return None

    def pieces(self, low: int, high: int) -> Iterator[Stretch]:
        """How the stretch [low, high) is cut."""
        if self._whole is not None:
            return self._whole.pieces(low, high, self._size)
        return ((low + a, low + b) for a, b in stretches_of(high - low, self._size))

    def start(self, low: int, high: int) -> None:
        """Start the sum of values[low:high]; never waits."""
        self._due.extend(self.pieces(low, high))
        self._fill()

    def poll(self) -> None:
        """Let what was started go on: MPI moves data only while some call is inside it. Never waits."""
        looks = LOOKS if self._comm.concurrent else 1
        while looks and self._advance():
            looks -= 1

    def arrivals(self) -> Iterator[Stretch]:
        """Wait for all that was started. Yields the pieces in the order in which they began, each once it is summed, so
        that the caller can use it while others are still under way."""
        heads = self._advance()
        while heads or self._over:
            if self._over:
                yield self._over.popleft()
            else:
                self._wait(heads)
            heads = self._advance()

    def finish(self) -> None:
        """Wait for all that was started."""
        for _ in self.arrivals():
            pass

    def wait_for(self, request: Request) -> None:
        """Wait until another operation is done that was started after the sums, and let them go on meanwhile."""
        while not request.test():
            heads = self._advance()
            if heads:
                self._wait(heads)
            else:
                request.wait()

    def _wait(self, heads: list[UnderWay]) -> None:
        """Wait until one of these stages can go on."""
        if len(heads) == 1:  # the wait is then recorded as that operation's own
            heads[0].requests[-1].wait()
        else:
            self._comm.wait_any([head.requests[-1] for head in heads])

    def _advance(self) -> list[UnderWay]:
        """Let every sum enter its next stage that may. Returns the sums that come next in each stage."""
        busy = self._under_way()
        for number, stage in enumerate(self._stages):
            while stage and stage[0].over():
                here = stage.popleft()
                self._enter(number + 1, here.piece, here.rest)
        if self._due:
            if busy and not self._under_way():
                self._most = min(MOST, 2 * self._most)
            self._fill()
        return [stage[0] for stage in self._stages if stage]

    def _under_way(self) -> int:
        return sum(map(len, self._stages))

    def _fill(self) -> None:
        while self._due and self._under_way() < self._most:
            piece = self._due.popleft()
            if piece not in self._addends:
                self._addends[piece] = self._addend(piece)
            self._addends[piece].carry = self.expected / self.divisor
            self._enter(0, piece, self._codec.reduce(self._addends[piece]))

    def _addend(self, piece: Stretch) -> Addend:
        here = slice(*piece)
        rest = self.rest[here] if self.rest is not None else None
        if self._whole is not None:
            return self._whole.addend(piece, rest)
        kept = {name: array[here] for name, array in self._kept.items()}
        return Addend(self._comm, self._values[here], rest, kept, self._begun)

    def _enter(self, number: int, piece: Stretch, rest: Iterator[list[Request]]) -> None:
        requests = next(rest, None)
        if requests is None:
            self._over.append(piece)
        else:
            self._stages[number].append(UnderWay(piece, rest, requests))

    def free(self) -> None:
        """Free the communicators, after `finish`. Collective."""
        self._addends = {}
        if self._whole is not None:
            self._whole.free()
        self._comm.free()
