"""The records that workers, the coordinator and the servers exchange, in addition to gradients and parameters.

Each kind of record has one structured dtype. Its size follows from numbers that are equal on all ranks of a phase, so a
rank allocates its records when it joins. The communicator sends their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from hpctrain.clock.decisions import Ask
from hpctrain.strategies.balance import Shares
from hpctrain.strategies.base import Result
from hpctrain.strategies.contribution import Contribution, Used, pack, unpack, words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hpctrain.comm.base import Buffer
    from hpctrain.data.queue import Stretch

WHY = 512  # maximum bytes of a reply's `why`, as UTF-8
RESULTS: tuple[Result | None, ...] = (None, *get_args(Result))  # by their code on the wire
NO_STEP = Contribution(0, 0.0, 0.0, Ask.NOTHING)
DType = np.dtype[Any]


class HeaderKind(IntEnum):
    """What a worker's header announces."""

    STEP = 1  # a gradient push
    STATE = 2  # servers must send their state to rank 0
    LEAVE = 3  # the worker's phase is over
    WITHDRAW = 4  # the worker's program has left the training loop


class What(IntEnum):
    """What all servers do with the gradients of `Decision.take`."""

    UPDATE = 1  # apply them
    DROP = 2  # drop them
    STATE = 3  # no gradients: send the shard's state to rank 0
    END = 4  # no gradients: the phase is over
    NAN = 5  # no gradients: the phase ends with NanError


class NotFinite(NamedTuple):
    """The loss or gradient that ends the phase, with nan = "stop"."""

    worker: int  # index of the worker it came from
    loss: float
    step: int
    bad: int  # as in `Contribution`


@dataclass(frozen=True)
class Header:
    """From a worker to the coordinator, with or without a push."""

    kind: HeaderKind
    version: int = 0  # of the parameters that the gradient was computed on
    round_end: int = 0  # the run's clock after the step, in samples, if all workers step together
    step: int = 0
    part: Contribution = NO_STEP


class Reply(NamedTuple):
    """From the coordinator to a worker: what became of its push."""

    worker: int  # index of the worker that receives it
    cursor: int  # the run's clock, in samples
    version: int  # of the parameters that come with the reply
    ask: Ask = Ask.NOTHING
    result: Result | None = None  # None: there was no push
    loss: float = 0.0
    samples: int = 0
    staleness: int = 0  # in versions
    held: int = 0  # how long the reply was held back, in nanoseconds
    slices: tuple[Stretch, ...] = ()  # samples dealt to the worker, in addition to those it already has
    why: str = ""  # why the phase ends
    nan: NotFinite | None = None  # raise NanError: no other reply follows
    overflow: bool = False  # as in `Outcome`
    # Samples, at most, of each worker in the next step and in the one after it; empty: all alike.
    shares: tuple[Shares, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the parameters come without a codec: what is asked may show or save them."""
        return bool(self.ask)


class Decision(NamedTuple):
    """From the coordinator to all servers, in the same order: consume the gradients of the workers `take`, then send
    parameters to the workers `give`.

    UPDATE: apply the sum of the gradients divided by `weight`, with `rate` times the learning rate and `momentum` times
    the momentum, as version `version`, to the parameters in `used`. NAN: raise NanError for `nan`. `exact`: parameters
    are sent without a codec, because something is asked of the workers that get them.
    """

    what: What
    take: tuple[int, ...] = ()
    give: tuple[int, ...] = ()
    version: int = 0
    step: int = 0
    weight: float = 1.0
    rate: float = 1.0
    momentum: float = 1.0
    used: Used = None
    nan: NotFinite | None = None
    exact: bool = False


NOT_FINITE: DType = np.dtype([("worker", "i8"), ("loss", "f8"), ("step", "i8"), ("bad", "i8")])  # worker -1: none


def header_dtype(slots: int) -> DType:
    """The dtype of a header, for a layout of `slots` parameters."""
    numbers = [("kind", "i8"), ("version", "i8"), ("round_end", "i8"), ("step", "i8")]
    return np.dtype([*numbers, ("part", "f8", (Contribution.length(slots),))])


def reply_dtype(stretches: int, workers: int) -> DType:
    """The dtype of a reply that deals out at most `stretches` stretches of samples, or shares of `workers` workers."""
    numbers = [("worker", "i8"), ("cursor", "i8"), ("version", "i8"), ("ask", "i8"), ("result", "i8"), ("loss", "f8")]
    numbers += [("samples", "i8"), ("staleness", "i8"), ("held", "i8")]
    dealt: list[Any] = [("dealt", "i8"), ("slices", "i8", (stretches, 2))]
    shares: list[Any] = [("shares", "i8", (2, workers))]
    return np.dtype([*numbers, *dealt, ("nan", NOT_FINITE), ("why", "S", WHY), ("overflow", "?"), *shares])


def decision_dtype(workers: int, slots: int) -> DType:
    """The dtype of a decision, for `workers` workers and a layout of `slots` parameters."""
    numbers = [("what", "i8"), ("version", "i8"), ("step", "i8"), ("weight", "f8"), ("rate", "f8"), ("momentum", "f8")]
    numbers += [("exact", "?")]
    sets: list[Any] = [("take", "?", (workers,)), ("give", "?", (workers,))]
    return np.dtype([*numbers, ("nan", NOT_FINITE), ("used", "f8", (words(slots),)), *sets])


class Record:
    """Memory for one record. Do not write to it while its bytes are being sent."""

    def __init__(self, dtype: DType) -> None:
        self._array = np.zeros(1, dtype)
        self.bytes: Buffer = self._array.view(np.uint8)  # the bytes to send, or to receive into

    def _fields(self) -> tuple[Any, ...]:
        """The fields in the dtype's order, as Python numbers; fields with several elements as arrays."""
        fields: tuple[Any, ...] = self._array.item()
        return fields


class HeaderRecord(Record):
    """A record of one header, for a layout of `slots` parameters."""

    def __init__(self, slots: int) -> None:
        super().__init__(header_dtype(slots))
        self._slots = slots

    def write(self, header: Header) -> None:
        """Write a header into the bytes."""
        part = header.part.encode(self._slots)
        self._array[0] = (header.kind, header.version, header.round_end, header.step, part)

    def read(self) -> Header:
        """The header in the bytes. It shares no memory with them."""
        kind, version, round_end, step, part = self._fields()
        return Header(HeaderKind(kind), version, round_end, step, Contribution.decode(part, self._slots))


class ReplyRecord(Record):
    """A record of one reply with at most `stretches` stretches; a reply with more raises ValueError. `workers`: how
    many have shares; 0: replies have none."""

    def __init__(self, stretches: int, workers: int = 0) -> None:
        super().__init__(reply_dtype(stretches, workers))
        self._slices = np.zeros((stretches, 2), np.int64)
        self._shares = np.zeros((2, workers), np.int64)

    def write(self, reply: Reply) -> None:
        """Write a reply into the bytes; cuts `why` to WHY bytes."""
        result, dealt = RESULTS.index(reply.result), len(reply.slices)
        if dealt:  # entries after these are ignored
            self._slices[:dealt] = reply.slices
        if reply.shares:
            self._shares[:] = reply.shares
        numbers = (*reply[:4], result, *reply[5:9])
        rest = _nan_fields(reply.nan), bounded(reply.why, WHY), reply.overflow, self._shares
        self._array[0] = (*numbers, dealt, self._slices, *rest)

    def read(self) -> Reply:
        """The reply in the bytes."""
        worker, cursor, version, ask, result, loss, samples, staleness, held, dealt, slices, *rest = self._fields()
        nan, why, overflow, shares = rest
        return Reply(
            worker,
            cursor,
            version,
            Ask(ask),
            RESULTS[result],
            loss,
            samples,
            staleness,
            held,
            tuple((start, stop) for start, stop in slices[:dealt].tolist()),
            why.decode(),
            _nan_of(nan),
            overflow,
            tuple(map(tuple, shares.tolist())) if shares.size else (),
        )


class DecisionRecord(Record):
    """A record of one decision, for `workers` workers and a layout of `slots` parameters."""

    def __init__(self, workers: int, slots: int) -> None:
        super().__init__(decision_dtype(workers, slots))
        self._workers, self._slots = workers, slots

    def write(self, decision: Decision) -> None:
        """Write a decision into the bytes: `take` and `give` as sets."""
        what, take, give, *numbers, used, nan, exact = decision
        members = self._members(take), self._members(give)
        self._array[0] = (what, *numbers, exact, _nan_fields(nan), pack(used, self._slots), *members)

    def read(self) -> Decision:
        """The decision in the bytes, with `take` and `give` in rank order. It shares no memory with them."""
        what, version, step, weight, rate, momentum, exact, nan, used, take, give = self._fields()
        return Decision(
            What(what),
            tuple(np.flatnonzero(take).tolist()),
            tuple(np.flatnonzero(give).tolist()),
            version,
            step,
            weight,
            rate,
            momentum,
            unpack(used, self._slots),
            _nan_of(nan),
            exact,
        )

    def _members(self, workers: tuple[int, ...]) -> NDArray[np.bool_]:
        members = np.zeros(self._workers, np.bool_)
        members[list(workers)] = True
        return members


def bounded(text: str, length: int) -> bytes:
    """`text` as at most `length` bytes of UTF-8. Longer text is cut between characters and ends with an ellipsis."""
    data = text.encode(errors="replace")
    if len(data) <= length:
        return data
    ellipsis = "…".encode()
    return data[: length - len(ellipsis)].decode(errors="ignore").encode() + ellipsis


def _nan_fields(nan: NotFinite | None) -> tuple[int, float, int, int]:
    return nan if nan is not None else (-1, 0.0, 0, 0)


def _nan_of(fields: tuple[int, float, int, int]) -> NotFinite | None:
    return NotFinite(*fields) if fields[0] >= 0 else None
