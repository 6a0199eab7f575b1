"""A stream (IterableDataset), addressed by the position of its samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from hpctrain.data.order import Order
from hpctrain.errors import DataError

_END = object()
BEGINNING = -1  # the place of what a stream does as it begins

Call = Callable[[int, int, Callable[[], Any]], Any]


class Stream:
    """Reads a stream that starts anew with every epoch; not for several threads at once.

    All ranks read the same stream and skip what is not theirs, so it must give the same samples everywhere:
    it may depend on the epoch (`set_epoch(epoch)` is called where it exists), not on the rank. Streams that end
    elsewhere on another rank are refused (by `Loader.bounds`); other differences cannot be seen. Going back
    reads it anew. While its length is unknown, all is kept that was read from the last `look_ahead`'s start
    on. `call(epoch, place, function)` is to return `function()`, which runs the stream's own code for that place.
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
        """Make a reading that is under way in another thread end after the sample it is at."""
        self._closed = True

    def forget(self) -> None:
        """Begin anew, and read again up to where the next sample is; as after an error inside the stream."""
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
        if unknown and offset >= self._base:  # keep it, for the round may be dealt out anew
            return list(islice(self._ahead, offset - self._base, offset - self._base + stop - start))
        self._go_to(epoch, offset)
        return [self._take() for _ in range(stop - start)]

    def look_ahead(self, start: int, stop: int) -> None:
        """Learn the length if the stream ends at or before `stop`; let go what lies before `start`."""
        if self._order.length is not None:
            return
        if self._iterator is None:
            self._restart(0)
        while self._base + len(self._ahead) <= stop:
            item = self._next()
            if item is _END:
                length = self._base + len(self._ahead)
                if length == 0:
                    raise DataError("the data set is a stream without a single sample")
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
                f"{self._order.length}; it has to give equally many in every epoch and on every rank"
            )
        self._base += 1
        return item

    def _next(self) -> Any:
        if self._closed:
            raise DataError("the stream was closed while it was read")
        if self._error is not None:  # a generator that has raised would now look like one that has ended
            raise self._error
        assert self._iterator is not None
        iterator, place = self._iterator, self._base + len(self._ahead)
        try:
            return self._call(self._epoch, place, lambda: next(iterator, _END))
        except BaseException as error:
            self._error = error
            error.add_note(f"while reading the stream in epoch {self._epoch}")
            raise
