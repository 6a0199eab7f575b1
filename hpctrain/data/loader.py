"""Fetching batches: in threads, ahead of the computation; never by fork, which MPI does not survive."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from hpctrain.alike import check_alike, stream_topic
from hpctrain.comm.base import Communicator
from hpctrain.data.augment import Augmentation
from hpctrain.data.memory import gatherer, unwrap
from hpctrain.data.order import Order, mix, round_bounds
from hpctrain.data.stream import Stream
from hpctrain.errors import DataError


@dataclass
class Batch:
    """`size` samples, collated: `inputs` and `targets` are tensors (n, ...), or nests of them.

    Samples that are not pairs are in `inputs` whole, and `targets` is None. An empty batch has neither.
    """

    inputs: Any
    targets: Any
    size: int


def fetches_ahead(dataset: Any, threads: int, prefetch: int, augment: Sequence[Any]) -> bool:
    """Whether a loader of these would fetch batches before they are taken: not what lies in memory as it is."""
    base, _ = unwrap(dataset)
    in_memory = not isinstance(base, IterableDataset) and gatherer(base) is not None and not augment
    return threads > 0 and prefetch > 0 and not in_memory


class Loader:
    """Gives the batches at positions [start, stop) of the run; one thread asks, `threads` others fetch ahead.

    Which thread fetches what makes no difference to a batch: the generator that the augmentations get is
    seeded by (seed, epoch, index of the sample). Data held in memory is gathered where it is taken, which is
    quicker than any hand-over. A data set may be asked for several samples at once by several threads if
    `threads` > 1.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        *,
        threads: int = 1,
        prefetch: int = 2,
        augment: Sequence[Augmentation] = (),
        seed: int = 0,
        workers: Communicator | None = None,
    ) -> None:
        """`threads` 0: fetch inline. `prefetch`: how many batches may be asked for ahead. `workers`: all who call
        `bounds` together; given, they compare where a stream of unknown length ends."""
        self._order = order
        self._workers = workers if workers is not None and workers.size > 1 else None
        self._augment = tuple(augment)
        self._seed = seed
        self._prefetch = prefetch
        self._pending: dict[tuple[int, int], tuple[int | None, Future[Batch]]] = {}
        self._closed = False
        self._base, self._picked = unwrap(dataset)
        streaming = isinstance(self._base, IterableDataset)
        self._stream = Stream(self._base, order) if streaming else None
        self._gather = None if streaming else gatherer(self._base)
        if streaming:
            threads = min(threads, 1)  # a stream has one order
        self._pool: ThreadPoolExecutor | None = None
        if fetches_ahead(dataset, threads, prefetch, augment):
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hpctrain-data")

    def bounds(self, cursor: int, round_size: int, workers: int) -> list[int]:
        """The positions that the round at `cursor` gives its workers; see `round_bounds`.

        A stream of unknown length is read to the round's end, so that all ranks, which all read the same,
        agree where it ends. What lies before `cursor` is not asked for again, or is read anew. Until its end was
        seen, this is collective over the workers, and raises DataError where it ends elsewhere on another rank.
        """
        if self._stream is not None and self._order.length is None:
            if self._pool is None:
                self._stream.look_ahead(cursor, cursor + round_size)
            else:
                self._pool.submit(self._stream.look_ahead, cursor, cursor + round_size).result()
        if self._stream is not None and not self._order.common:
            self._compare(cursor + round_size)
        return round_bounds(cursor, self._order.length, round_size, workers)

    def _compare(self, read: int) -> None:
        """Whether the stream ends within the first `read` samples; a thread may have seen its end ahead of that."""
        length = self._order.length if self._order.length is not None and self._order.length <= read else None
        if self._workers is not None:
            check_alike(self._workers, [stream_topic(length, read)], everywhere=False)
        self._order.common = length is not None

    @property
    def length(self) -> int | None:
        """Samples per epoch; None while a stream has not shown its end."""
        return self._order.length

    def request(self, start: int, stop: int) -> None:
        """Start fetching [start, stop); ignored where nothing is fetched ahead, or enough is on its way.

        It may prove to lie behind the end of a stream: then it is forgotten.
        """
        if self._pool is None or start == stop:
            return
        self._drop_outdated()
        if (start, stop) not in self._pending and len(self._pending) < self._prefetch:
            known = self._order.length
            self._pending[start, stop] = known, self._pool.submit(self._fetch_ahead, start, stop, known)

    def take(self, start: int, stop: int) -> Batch:
        """The batch at [start, stop): the one requested, or fetched now. Requests from before it are dropped.

        Raises DataError for samples that make no batch, and whatever the user's data set or augmentation did.
        """
        self._drop_outdated()
        _, future = self._pending.pop((start, stop), (None, None))
        for key in [key for key in self._pending if future is None or key[0] < start]:
            self._pending.pop(key)[1].cancel()  # the plan has changed, if nothing was requested for now
        if future is not None:
            return future.result()
        if self._pool is not None and self._stream is not None:
            return self._pool.submit(self._fetch, start, stop).result()  # only that thread reads the stream
        return self._fetch(start, stop)

    def close(self) -> None:
        """End the threads, after the sample that each is at. May be called twice."""
        self._closed = True
        self._pending.clear()
        if self._stream is not None:
            self._stream.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outdated(self, stop: int, known: int | None) -> bool:
        """Whether a request, made when the stream's length was `known`, went past its end, as shown since."""
        return known is None and self._order.length is not None and stop > self._order.length

    def _drop_outdated(self) -> None:
        for key in [key for key, (known, _) in self._pending.items() if self._outdated(key[1], known)]:
            self._pending.pop(key)[1].cancel()

    def _fetch_ahead(self, start: int, stop: int, known: int | None) -> Batch:
        if self._outdated(stop, known):
            raise ValueError(
                "behind the end of the stream"
            )  # never taken, and to read it would lose the place
        return self._fetch(start, stop)

    def _fetch(self, start: int, stop: int) -> Batch:
        epoch, offset = self._order.place(start, stop)
        if start == stop:
            return Batch(None, None, 0)
        if self._stream is not None:
            indices = np.arange(offset, offset + stop - start)
            return _collate(self._augmented(self._stream.read(start, stop), epoch, indices))
        indices = self._order.indices(start, stop)
        places = indices if self._picked is None else self._picked[indices]  # in what is inside the `Subset`s
        if self._gather is None:
            return _collate(self._augmented(self._items(places), epoch, indices))
        columns = list(self._gather(places))
        if self._augment:
            columns[0] = torch.stack(self._augmented(list(columns[0].unbind()), epoch, indices))
        inputs, targets = columns if len(columns) == 2 else (columns, None)
        return Batch(inputs, targets, stop - start)

    def _items(self, places: NDArray[np.int64]) -> list[Any]:
        if callable(getattr(self._base, "__getitems__", None)):  # torch's own name for many at once
            return list(self._base.__getitems__(places.tolist()))
        items = []
        for place in places.tolist():
            if self._closed:
                raise DataError("the loader was closed while it fetched")
            try:
                items.append(self._base[place])
            except Exception as error:
                error.add_note(f"while fetching sample {place} of the data set")
                raise
        return items

    def _augmented(self, items: list[Any], epoch: int, indices: NDArray[np.int64]) -> list[Any]:
        """Items with the augmentations applied to each one's input."""
        if not self._augment:
            return items
        generator = torch.Generator()
        done = []
        for item, seed in zip(items, mix(self._seed, epoch, indices).tolist(), strict=True):
            generator.manual_seed(seed)
            pair = _is_pair(item)
            sample = item[0] if pair else item
            if not isinstance(sample, Tensor):
                raise DataError(
                    f"data.augment works on tensors, but the data set's samples are of type "
                    f"{type(sample).__name__}; let the data set give tensors, or augment in it"
                )
            for function in self._augment:
                sample = function(sample, generator)
            done.append((sample, item[1]) if pair else sample)
        return done


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _collate(items: list[Any]) -> Batch:
    try:
        collated = default_collate(items)
        inputs, targets = collated if _is_pair(items[0]) else (collated, None)
        return Batch(inputs, targets, len(items))
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"the data set's samples cannot be made into a batch ({str(error).splitlines()[0]}); each has "
            "to be a tensor, array or number, or a pair or dictionary of such, equally shaped in all samples"
        ) from error
