"""Fetches batches in threads, ahead of the computation; never by fork, which MPI does not survive.

A sample must depend on (seed, epoch, index) alone. But a data set's code may draw from the global generators of Python,
NumPy and torch, which all threads share, including the training loop. So a sample is fetched in one of three ways:

- By the calling thread ("inline"): the generators are seeded for each sample and restored after the batch. Used if no
  threads are configured, for a loader's first batches (`PROBES`), and permanently once a draw was detected.
- In other threads, ahead, as long as nothing is drawn. If the training loop itself draws from torch's generator
  (dropout on the CPU), the threads are guarded: a draw is stopped before it happens. Otherwise the generators are
  checked with each batch. If something was drawn, the samples already fetched are fetched again from the same states,
  which shows which side drew: the training loop gets its generator states back, and the fetched samples are discarded.
- In other threads, unchecked: data in memory with our own augmentations draws nothing.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from hpctrain.comm.alike import check_alike, stream_topic
from hpctrain.comm.base import Communicator
from hpctrain.data.augment import Augmentation, draws_only_from_its_own
from hpctrain.data.collate import collate, tensor_of
from hpctrain.data.generators import DrewError, Generators, NoDraws, kept, seed_all
from hpctrain.data.memory import gatherer, only_indexed, unwrap
from hpctrain.data.order import Order, mix, round_bounds
from hpctrain.data.stream import Stream
from hpctrain.errors import DataError


@dataclass
class Batch:
    """A batch of `size` collated samples: `inputs` and `targets` are tensors (n, ...), or nested structures of them.

    Samples that are not pairs, such as mappings, are entirely in `inputs`, and `targets` is None. An empty batch has
    neither.
    """

    inputs: Any
    targets: Any
    size: int

    @property
    def reference(self) -> Any:
        """What loss and metric compare a model's outputs with: the targets, or the mapping if samples are mappings
        without a separate target."""
        return self.inputs if self.targets is None and isinstance(self.inputs, Mapping) else self.targets


Collate = Callable[[list[Any]], Any]
"""Makes a batch of samples, like torch's `collate_fn`: a pair (inputs, targets), or all of it as inputs."""


def fetches_ahead(dataset: Any, threads: int, prefetch: int, work: Sequence[Any]) -> bool:
    """Whether a loader with these arguments fetches batches ahead: not for data in memory without `work`, functions
    that augment or collate its samples."""
    base, _ = unwrap(dataset)
    in_memory = not isinstance(base, IterableDataset) and gatherer(base) is not None and not work
    return threads > 0 and prefetch > 0 and not in_memory


PROBES = 2  # batches fetched inline, to detect draws by the data set, and by the training loop in between
_BLOCK = 256
# keep the draws of samples, augmentations and collating unrelated
_ITEM, _AUGMENT, _COLLATE = 0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x2545F4914F6CDD1D


class Loader:
    """Provides the batches at positions [start, stop) of the run; one thread calls it, `threads` others fetch ahead.

    A batch does not depend on which thread fetches it: the generator passed to the augmentations is seeded by (seed,
    epoch, index of the sample), and so are the global ones (see the module). Data in memory is gathered by the calling
    thread, which is faster than handing it over. If `threads` > 1, several threads may request samples of the data set
    at the same time.
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
        collate: Collate | None = None,
    ) -> None:
        """`threads` 0: fetch inline. `prefetch`: how many batches may be requested ahead. `workers`: the ranks that
        call `bounds` together; if given, they compare where a stream of unknown length ends. `collate`: makes batches
        of samples; None: as torch's default does (`data.collate`)."""
        self._order = order
        self._workers = workers if workers is not None and workers.size > 1 else None
        self._augment = tuple(augment)
        self._seed = seed
        self._prefetch = prefetch
        self._pending: dict[tuple[int, int], tuple[int | None, Future[Batch]]] = {}
        self._closed = False
        self._base, self._picked = unwrap(dataset)
        streaming = isinstance(self._base, IterableDataset)
        self._stream = Stream(self._base, order, self._read) if streaming else None
        self._collate = collate
        self._gather = None if streaming or collate is not None else gatherer(self._base)
        self._threads = min(threads, 1) if streaming else threads  # a stream has one order
        self._pool: ThreadPoolExecutor | None = None
        self._draws_augmenting = not all(draws_only_from_its_own(function) for function in self._augment)
        own = self._draws_augmenting or collate is not None or not only_indexed(self._base)
        self._draws = own  # the user's own code is assumed to draw
        work = [*self._augment, *([] if collate is None else [collate])]
        self._alone = not fetches_ahead(dataset, self._threads, prefetch, work)
        self._probes = PROBES if self._draws and not self._alone else 0
        self._drew = False  # during a probe
        self._guarded = streaming
        self._harmless: set[Any] = set()
        self._left: Generators | None = None  # as the calling thread left them after its last batch
        self._started: deque[_Started] = deque()  # fetched in threads since then

    def bounds(
        self, cursor: int, round_size: int, workers: int, shares: Sequence[int] | None = None
    ) -> Sequence[int]:
        """The positions that the round at `cursor` assigns to its workers; see `round_bounds`.

        A stream of unknown length is read to the end of the round, so that all ranks, which all read the same stream,
        agree on where it ends. Samples before `cursor` are not requested again, or else are read again. Until the
        stream's end is known, this is collective over the workers, and raises DataError if the stream ends elsewhere on
        another rank.
        """
        if self._stream is not None and self._order.length is None:
            self._look_ahead(self._stream, cursor, cursor + round_size)
        if self._stream is not None and not self._order.common:
            self._compare(cursor + round_size)
        return round_bounds(cursor, self._order.length, round_size, workers, shares)

    def _compare(self, read: int) -> None:
        """Compare whether the stream ends within the first `read` samples; a thread may already have read further."""
        length = self._order.length if self._order.length is not None and self._order.length <= read else None
        if self._workers is not None:
            check_alike(self._workers, [stream_topic(length, read)], everywhere=False)
        self._order.common = length is not None

    @property
    def length(self) -> int | None:
        """Samples per epoch; None while the end of a stream is not known."""
        return self._order.length

    def request(self, start: int, stop: int) -> None:
        """Start fetching [start, stop); ignored if nothing is fetched ahead, or if enough batches are pending.

        If the range turns out to lie past the end of a stream, the request is dropped.
        """
        if self._inline or self._closed or start == stop:
            return
        self._drop_outdated()
        if (start, stop) not in self._pending and len(self._pending) < self._prefetch:
            known = self._order.length
            self._pending[start, stop] = known, self._threads_of_it().submit(self._fetch_ahead, start, stop, known)

    def take(self, start: int, stop: int) -> Batch:
        """The batch at [start, stop): as requested earlier, or fetched now. Drops requests for earlier positions.

        Raises DataError for samples that cannot be collated, and whatever the user's data set or augmentation raises.
        """
        self._drop_outdated()
        _, future = self._pending.pop((start, stop), (None, None))
        for key in [key for key in self._pending if future is None or key[0] < start]:
            self._pending.pop(key)[1].cancel()  # nothing requested for this position: the plan has changed
        if start == stop:
            return Batch(None, None, 0)
        if not self._inline:
            batch = self._take_ahead(start, stop, future)
            if batch is not None:
                return batch
        return self._fetch_inline(start, stop)

    def close(self) -> None:
        """Stop the threads after their current sample. May be called twice."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        self._end_threads()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outdated(self, stop: int, known: int | None) -> bool:
        """Whether a request, made when the stream's length was `known`, extends past its end, which is now known."""
        return known is None and self._order.length is not None and stop > self._order.length

    def _drop_outdated(self) -> None:
        for key in [key for key, (known, _) in self._pending.items() if self._outdated(key[1], known)]:
            self._pending.pop(key)[1].cancel()

    def _fetch_ahead(self, start: int, stop: int, known: int | None) -> Batch:
        if self._outdated(stop, known):
            raise ValueError("past the end of the stream")  # never taken, and reading it would lose the position
        return self._fetch(start, stop)

    def _fetch(self, start: int, stop: int) -> Batch:
        epoch, offset = self._order.place(start, stop)
        if self._stream is not None:
            indices = np.arange(offset, offset + stop - start)
            return self._batched(self._augmented(self._stream.read(start, stop), epoch, indices), epoch, indices)
        indices = self._order.indices(start, stop)
        places = indices if self._picked is None else self._picked[indices]  # in the data set inside the `Subset`s
        if self._gather is None:
            return self._batched(self._augmented(self._items(places, epoch, indices), epoch, indices), epoch, places)
        gather = self._gather
        seed = self._seeds(epoch, indices[:1])[0] ^ _ITEM if self._draws else 0
        columns = list(self._run(seed, lambda: gather(places)))
        if self._augment:
            columns[0] = torch.stack(self._augmented(list(columns[0].unbind()), epoch, indices))
        inputs, targets = columns if len(columns) == 2 else (columns, None)
        return Batch(inputs, targets, stop - start)

    def _items(self, places: NDArray[np.int64], epoch: int, indices: NDArray[np.int64]) -> list[Any]:
        seeds = self._seeds(epoch, indices)
        if callable(getattr(self._base, "__getitems__", None)):  # torch's name for fetching many at once
            return list(self._run(seeds[0] ^ _ITEM, lambda: self._base.__getitems__(places.tolist())))
        items = []
        for place, seed in zip(places.tolist(), seeds, strict=True):
            if self._closed:
                raise DataError("the loader was closed while it fetched")
            try:
                items.append(self._run(seed ^ _ITEM, partial(operator.getitem, self._base, place)))
            except Exception as error:
                error.add_note(f"while fetching sample {place} of the data set")
                raise
        return items

    def _batched(self, items: list[Any], epoch: int, indices: NDArray[np.int64]) -> Batch:
        """A batch of these samples, which have these indices."""
        own = self._collate
        if own is None:
            return _batch(collate(items, indices), _is_pair(items[0]), len(items))
        made = self._run(self._seeds(epoch, indices[:1])[0] ^ _COLLATE, partial(own, items))
        return _batch(made, _is_pair(made), len(items))

    def _augmented(self, items: list[Any], epoch: int, indices: NDArray[np.int64]) -> list[Any]:
        """The items, with the augmentations applied to each input."""
        if not self._augment:
            return items
        done = []
        for item, index, seed in zip(items, indices.tolist(), self._seeds(epoch, indices), strict=True):
            pair = _is_pair(item)
            sample = item[0] if pair else item
            if isinstance(sample, np.ndarray):
                sample = tensor_of(sample)
            if not isinstance(sample, (Tensor, Mapping)):
                raise DataError(
                    f"data.augment works on tensors, arrays and mappings, but sample {index} of the data set is of "
                    f"type {type(sample).__name__}; return one of these from the data set, or augment there"
                )
            augment = partial(self._augment_one, sample, seed)
            sample = self._run(seed ^ _AUGMENT, augment) if self._draws_augmenting else augment()
            done.append((sample, item[1]) if pair else sample)
        return done

    def _augment_one(self, sample: Any, seed: int) -> Any:
        generator = torch.Generator()
        generator.manual_seed(seed)
        for function in self._augment:
            sample = function(sample, generator)
        return sample

    # -- which side draws --------------------------------------------------------------------------------------
    @property
    def _inline(self) -> bool:
        return self._alone or self._probes > 0

    def _seeds(self, epoch: int, indices: NDArray[np.int64]) -> list[int]:
        seeds: list[int] = mix(self._seed, epoch, indices).tolist()
        return seeds

    def _read(self, epoch: int, place: int, function: Callable[[], Any]) -> Any:
        """Run a stream's code for that place."""
        block, place = divmod(place, _BLOCK)
        return self._run(_block_of_seeds(self._seed, epoch, block)[place] ^ _ITEM, function)

    def _run(self, seed: int, function: Callable[[], Any]) -> Any:
        """`function()`, the user's code for one sample (or batch): seeded if inline, otherwise watched."""
        if not self._draws:
            return function()
        if not self._inline:
            started = _Started(function)
            self._started.append(started)
            try:
                return self._watched(function)
            finally:
                started.ended = True
        seed_all(seed)
        if not self._probes:
            return function()
        before = Generators.now()
        value = function()
        self._drew = self._drew or bool(before.differing(Generators.now()))
        return value

    def _watched(self, function: Callable[[], Any]) -> Any:
        return NoDraws(self._harmless).run(function) if self._guarded else function()

    def _fetch_inline(self, start: int, stop: int) -> Batch:
        if not self._draws:
            return self._fetch(start, stop)
        if self._probes:
            self._check_training_draws()
        with kept():
            batch = self._fetch(start, stop)
        if self._probes:
            self._alone = self._alone or self._drew
            self._probes -= 1
            self._left = Generators.now()
        return batch

    def _check_training_draws(self) -> None:
        """Draws since the last batch, with no other thread running, came from the training loop."""
        drawn = Generators.now().differing(self._left) if self._left is not None else set()
        self._guarded = self._guarded or "torch" in drawn
        self._alone = self._alone or bool(drawn - {"torch"})

    def _take_ahead(self, start: int, stop: int, future: Future[Batch] | None) -> Batch | None:
        """The requested batch; None if something was drawn and it must be fetched inline."""
        try:
            if future is not None:
                batch = future.result()
            elif self._stream is not None:  # only that thread reads the stream
                batch = self._threads_of_it().submit(self._fetch, start, stop).result()
            else:
                batch = self._fetch(start, stop)
        except DrewError:
            self._settle(reported=True)
            return None
        if self._draws and not self._is_undisturbed():
            self._settle()
        return None if self._alone else batch

    def _look_ahead(self, stream: Stream, start: int, stop: int) -> None:
        """Let the stream read ahead, in the thread that does all its reading."""
        if not self._inline:
            try:
                self._threads_of_it().submit(stream.look_ahead, start, stop).result()
                return
            except DrewError:
                self._settle(reported=True)
        with kept():
            stream.look_ahead(start, stop)

    def _is_undisturbed(self) -> bool:
        """Whether nothing was drawn since the last batch (torch's generator, if guarded: whether it was not seeded)."""
        assert self._left is not None
        now = Generators.now()
        if now.differing(self._left) - {"torch" if self._guarded else "seed"}:
            return False
        self._left = now
        while self._started and self._started[0].ended:
            self._started.popleft()
        return True

    def _settle(self, reported: bool = False) -> None:
        """Handle a detected draw: fetch inline from now on, and restore the training loop's generators.

        Does not switch to inline if only the training loop drew, and only what can be guarded. `reported`: by the
        guard.
        """
        self._end_threads()
        if self._stream is not None:
            self._stream.forget()
        assert self._left is not None
        now = Generators.now()
        drawn = now.differing(self._left) - {"torch" if self._guarded else "seed"}
        again = self._fetched_again(self._left) if self._stream is None else None
        by_fetching = drawn & again.differing(self._left) if again is not None else drawn
        unclear = by_fetching & (again.differing(now) | {"seed"}) if again is not None else drawn
        if unclear:
            raise DataError(
                f"{' and '.join(sorted(unclear)).replace('seed', 'torch')}'s global generator was used while samples "
                "were fetched in a separate thread, so the random numbers depend on timing; set data.threads = 0: "
                "the training loop then fetches each sample with generators seeded for it"
            )
        self._left = now.replace(self._left, by_fetching)
        self._left.restore()
        self._started.clear()
        self._alone = self._alone or reported or bool(by_fetching or drawn - {"torch"})
        self._guarded = True

    def _fetched_again(self, left: Generators) -> Generators:
        """The generators as they would be if, starting from `left`, only the fetches in threads had drawn from them."""
        left.restore()
        for started in self._started:
            with suppress(Exception, DrewError):
                self._watched(started.function)
        return Generators.now()

    def _threads_of_it(self) -> ThreadPoolExecutor:
        if self._closed:
            raise DataError("the loader was closed")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="hpctrain-data")
        return self._pool

    def _end_threads(self) -> None:
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@lru_cache(maxsize=4)
def _block_of_seeds(seed: int, epoch: int, block: int) -> list[int]:
    """The seeds of a block of a stream's samples: computing them one by one would cost more than seeding."""
    seeds: list[int] = mix(seed, epoch, np.arange(block * _BLOCK, (block + 1) * _BLOCK)).tolist()
    return seeds


@dataclass
class _Started:
    """A sample being fetched in a thread."""

    function: Callable[[], Any]
    ended: bool = False


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _batch(collated: Any, pair: bool, size: int) -> Batch:
    inputs, targets = collated if pair else (collated, None)
    return Batch(inputs, targets, size)
