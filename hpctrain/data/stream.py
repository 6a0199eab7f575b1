"""A stream (IterableDataset), addressed by the position of its samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from hpctrain.data.order import Order
from hpctrain.errors import DataError

_END = object()
BEGINNING = -1  # the place of the code that a stream runs when it starts

Call = Callable[[int, int, Callable[[], Any]], Any]


class Stream:
    """Reads a stream that restarts with every epoch; not thread-safe.

    All ranks read the same stream and skip the samples of others, so it must provide the same samples everywhere: it
    may depend on the epoch (`set_epoch(epoch)` is called if it exists), not on the rank. Streams that end elsewhere on
    another rank are rejected (by `Loader.bounds`); other differences cannot be detected. Going back restarts the
    stream. While its length is unknown, all samples from the start of the last `look_ahead` on are kept. `call(epoch,
    place, function)` must return `function()`, which runs the stream's own code for that place.
    """

    def __init__(self, dataset: Any, order: Order, call: Call = lambda epoch, place, function: function()) -> None:
        self._dataset = dataset
        self._order = order
        self._call = call
        self._iterator: Iterator[Any] | None = None
        self._error: BaseException | None = None
        self._epoch = -1
        self._base = 0  # the place in the epoch of the first item of _ahead, or of the next one to read
        self._ahead: deque[Any] = deque()
        self._closed = False

    def close(self) -> None:
        """Stop a read in progress in another thread after its current sample."""
        self._closed = True

    def forget(self) -> None:
        """Restart, and read again up to the next sample; also used after an error inside the stream."""
        self._iterator = None
        self._base = 0
        self._ahead.clear()

    def read(self, start: int, stop: int) -> list[Any]:
        """The samples at positions [start, stop) of the run. DataError if the stream ends before them."""
        unknown = self._order.length is None
        self.look_ahead(self._base, stop)
        if unknown and self._order.length is not None and stop > self._order.length:
            raise ValueError(f"position {stop} was asked for, but the stream ended at {self._order.length}")
        epoch, offset = self._order.place(start, stop)
        if unknown and offset >= self._base:  # keep it, because the round may be dealt out again
            return list(islice(self._ahead, offset - self._base, offset - self._base + stop - start))
        self._go_to(epoch, offset)
        return [self._take() for _ in range(stop - start)]

    def look_ahead(self, start: int, stop: int) -> None:
        """Learn the length if the stream ends at or before `stop`; discard samples before `start`."""
        if self._order.length is not None:
            return
        if self._iterator is None:
            self._restart(0)
        while self._base + len(self._ahead) <= stop:
            item = self._next()
            if item is _END:
                length = self._base + len(self._ahead)
                if length == 0:
                    raise DataError("the data set is a stream with no samples")
                self._order.learn(length)
                return
            self._ahead.append(item)
            while self._base < start and self._ahead:
                self._take()

    def _go_to(self, epoch: int, offset: int) -> None:
        if self._iterator is None or epoch != self._epoch or offset < self._base:
            self._restart(epoch)
        while self._base < offset:
            self._take()

    def _restart(self, epoch: int) -> None:
        if callable(getattr(self._dataset, "set_epoch", None)):
            self._dataset.set_epoch(epoch)
        self._iterator = self._call(epoch, BEGINNING, lambda: iter(self._dataset))
        self._epoch, self._base, self._error = epoch, 0, None
        self._ahead.clear()

    def _take(self) -> Any:
        item = self._ahead.popleft() if self._ahead else self._next()
        if item is _END:
            raise DataError(
                f"the stream ended after {self._base} samples in epoch {self._epoch}, but its length is "
                f"{self._order.length}; it must yield the same number in every epoch and on every rank"
            )
        self._base += 1
        return item

    def _next(self) -> Any:
        if self._closed:
            raise DataError("the stream was closed while it was read")
        if self._error is not None:  # a generator that has raised would now look as if it had ended
            raise self._error
        assert self._iterator is not None
        iterator, place = self._iterator, self._base + len(self._ahead)
        try:
            return self._call(self._epoch, place, lambda: next(iterator, _END))
        except BaseException as error:
            self._error = error
            error.add_note(f"while reading the stream in epoch {self._epoch}")
            raise
