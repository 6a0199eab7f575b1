"""The loader: the same batches for any thread and time of fetching; errors surface; streams keep their position."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from hpctrain.data.augment import augmentations, flip, shift
from hpctrain.data.loader import PROBES, Batch, Loader
from hpctrain.data.memory import Images
from hpctrain.data.order import Order, round_bounds
from hpctrain.errors import DataError, JobError


class Squares(Dataset[tuple[Tensor, int]]):
    """(i, i squared), one at a time; with a delay if set."""

    def __init__(self, length: int, seconds: float = 0.0) -> None:
        self.length = length
        self.seconds = seconds
        self.threads: set[str] = set()
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        self.fetched.append(index)
        return torch.full((1, 4, 4), float(index)), index * index


class Count(IterableDataset[Any]):
    """0, 1, 2, ... `length` - 1, plus 1000 per epoch; counts how often it was started."""

    def __init__(self, length: int, known: bool = False) -> None:
        self.length = length
        self.epoch = 0
        self.begun = 0
        if known:
            self.__class__ = KnownCount

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        return iter(range(1000 * self.epoch, 1000 * self.epoch + self.length))


class KnownCount(Count):
    """A stream of known length."""

    def __len__(self) -> int:
        return self.length


def past_probes(loader: Loader, start: int) -> Loader:
    """A loader past its first inline batches, of one sample each from `start` on."""
    for place in range(start, start + PROBES):
        loader.take(place, place + 1)
    return loader


def image_set(length: int = 40) -> TensorDataset:
    """Random images, (length, 1, 8, 8), and their numbers."""
    return TensorDataset(
        torch.rand(length, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(length)
    )


def run(loader: Loader, order: Order, worker: int, workers: int, batch: int, samples: int) -> list[Batch]:
    """A worker's batches until the cursor is at `samples`, prefetched as by a trainer."""
    taken, cursor = [], 0
    while cursor < samples:
        bounds = loader.bounds(cursor, workers * batch, workers)
        taken.append(loader.take(bounds[worker], bounds[worker + 1]))
        cursor = ahead = bounds[-1]
        for _ in range(2):
            coming = round_bounds(ahead, order.length, workers * batch, workers)
            loader.request(coming[worker], coming[worker + 1])
            ahead = coming[-1]
    return taken


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    """Both lists of batches hold the same samples, bit for bit."""
    assert [batch.size for batch in one] == [batch.size for batch in other]
    for a, b in zip(one, other, strict=True):
        if a.size:
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("data", [image_set(), Subset(image_set(), list(range(3, 38))), Squares(35)])
@pytest.mark.parametrize("augment", [[], [shift, flip]])
def test_same_batches_for_any_number_of_threads(data: Any, augment: list[Any]) -> None:
    found = []
    for threads, prefetch in ((0, 2), (1, 0), (1, 2), (3, 4)):
        order = Order(len(data), seed=5)
        with Loader(data, order, threads=threads, prefetch=prefetch, augment=augment, seed=5) as loader:
            found.append(run(loader, order, 1, 3, 4, 3 * len(data)))
    for other in found[1:]:
        assert_equal(found[0], other)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 8), st.sampled_from([0, 2]))
def test_workers_together_take_every_sample_once(length: int, workers: int, batch: int, threads: int) -> None:
    for data in (Squares(length), Count(length), Count(length, known=True)):
        seen: list[int] = []
        for worker in range(workers):
            known = None if type(data) is Count else length
            order = Order(known, seed=1, shuffle=isinstance(data, Squares))
            with Loader(data, order, threads=threads) as loader:
                for taken in run(loader, order, worker, workers, batch, 2 * length):
                    if taken.size:
                        seen += (
                            taken.inputs[:, 0, 0, 0] if isinstance(data, Squares) else taken.inputs
                        ).tolist()
        second = 0 if isinstance(data, Squares) else 1000
        assert sorted(seen) == sorted([*range(length), *range(second, second + length)])


def test_gathering_in_memory_equals_collating_items() -> None:
    data = image_set(20)
    order = Order(20, seed=2)
    pixels = (data.tensors[0] * 255).to(torch.uint8)
    images = Images(pixels, data.tensors[1], mean=0.1, std=0.3)
    for whole in (data, Subset(Subset(data, list(range(20))[::-1]), [*range(5, 20), *range(5)]), images):
        one_by_one = [whole[int(i)] for i in order.indices(3, 9)]
        batch = Loader(whole, order, threads=0).take(3, 9)
        assert torch.equal(batch.inputs, torch.stack([item[0] for item in one_by_one]))
        assert batch.targets.tolist() == [int(item[1]) for item in one_by_one]
    torch.testing.assert_close(images[4][0], (pixels[4] / 255 - 0.1) / 0.3)


def test_gathering_in_memory_uses_no_thread() -> None:
    before = threading.active_count()
    loader = Loader(image_set(2000), Order(2000))
    loader.take(0, 32)
    for start in range(0, 1600, 32):
        loader.request(start + 32, start + 64)
        loader.take(start, start + 32)
    assert threading.active_count() == before


def test_prefetching_threads_end() -> None:
    data = Squares(64)
    loader = past_probes(Loader(data, Order(64, shuffle=False), threads=2), 62)
    assert data.threads == {threading.current_thread().name}
    data.threads.clear()
    loader.request(0, 8)
    loader.request(8, 16)
    assert loader.take(0, 8).targets.tolist() == [i * i for i in range(8)]
    assert all(name.startswith("hpctrain-data") for name in data.threads)
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpctrain-data")]


def test_closing_waits_for_a_sample_not_for_a_batch() -> None:
    loader = past_probes(Loader(Squares(1000, seconds=0.05), Order(1000)), 0)
    loader.request(0, 1000)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5


def test_requested_batches_are_fetched_before_they_are_taken() -> None:
    data = Squares(8)
    loader = past_probes(Loader(data, Order(8)), 0)
    data.fetched.clear()
    loader.request(0, 8)
    deadline = time.monotonic() + 20
    while len(data.fetched) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    loader.take(0, 8)
    assert sorted(data.fetched) == list(range(8))
    loader.close()


def test_requests_that_are_not_taken_are_dropped() -> None:
    order = Order(400, shuffle=False)
    with Loader(Squares(400), order, prefetch=2) as loader:
        past_probes(loader, 0)
        loader.request(0, 10)
        loader.request(10, 20)
        loader.request(20, 30)  # one too many: ignored
        assert list(loader._pending) == [(0, 10), (10, 20)]
        assert loader.take(10, 20).targets[0] == 100
        assert not loader._pending  # what came before it has gone
        loader.request(30, 40)
        assert loader.take(200, 205).targets.tolist() == [i * i for i in range(200, 205)]
        assert not loader._pending  # another plan


class Broken(Squares):
    """Its sample 13 cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 13:
            raise KeyError("no such picture")
        return super().__getitem__(index)


@pytest.mark.parametrize("threads", [0, 1])
def test_data_set_error_surfaces_in_take(threads: int) -> None:
    with Loader(Broken(40), Order(40, shuffle=False), threads=threads) as loader:
        past_probes(loader, 0)
        loader.request(0, 10)
        loader.request(10, 20)
        assert loader.take(0, 10).size == 10
        with pytest.raises(KeyError, match="no such picture") as caught:
            loader.take(10, 20)
        assert caught.value.__notes__ == ["while fetching sample 13 of the data set"]
        assert "__getitem__" in [entry.name for entry in caught.traceback]
        assert loader.take(20, 30).size == 10


def test_samples_of_any_kind() -> None:
    order = Order(6, shuffle=False)
    dictionaries = [{"image": np.ones(3) * i, "name": str(i)} for i in range(6)]
    batch = Loader(dictionaries, order, threads=0).take(0, 2)
    assert batch.inputs["image"].shape == (2, 3)
    assert batch.inputs["name"] == ["0", "1"]
    assert batch.targets is None
    for samples in (list("abcdef"), [torch.ones(2)] * 6, [(1.0, 2, 3)] * 6):
        assert Loader(samples, order, threads=0).take(0, 2).targets is None
    assert len(Loader(TensorDataset(torch.ones(6, 2)), order).take(0, 2).inputs) == 1
    empty = Loader(dictionaries, order, threads=0).take(6, 6)
    assert (empty.inputs, empty.targets, empty.size) == (None, None, 0)


def test_samples_that_do_not_collate() -> None:
    order = Order(4, shuffle=False)
    for samples, words in (
        ([torch.ones(i + 1) for i in range(4)], r"sample 1 of .* with sample 0: it has shape \(2,\), but there it has"),
        ([object()] * 4, "sample 0 of the data set cannot be put into a batch: it is of type object; a sample is"),
        ([(torch.ones(1), {"a": 1})] * 3 + [(torch.ones(1), {"a": None})], r"sample 3 .* its part \[1\]\['a'\] is of"),
        ([np.array(["a", i], object) for i in range(4)], "sample 0 .*: it is an array of dtype object"),
        ([{"a": 1}, {"b": 1}, {}, {}], r"sample 1 .* it has the parts \['b'\], but there it has \['a'\]"),
        ([1, "two", 3, 4], "sample 1 .* it is of type str, but there it is of type int"),
    ):
        with pytest.raises(DataError, match=words):
            Loader(samples, order, threads=0).take(0, 4)
    with pytest.raises(DataError, match="works on tensors, arrays and mappings, but sample 0 .* of type str"):
        Loader(["a"] * 4, order, threads=0, augment=[flip]).take(0, 2)


def test_augmentation_depends_on_the_sample_only() -> None:
    """It depends on seed, epoch and sample, not on the batch."""
    data = image_set(40)
    order = Order(40, seed=1, shuffle=False)
    whole = Loader(data, order, threads=0, augment=[shift], seed=1).take(0, 40).inputs
    part = Loader(data, order, threads=0, augment=[shift], seed=1).take(17, 23).inputs
    assert torch.equal(whole[17:23], part)
    assert not torch.equal(whole, Loader(data, order, threads=0, augment=[shift], seed=1).take(40, 80).inputs)
    assert not torch.equal(whole, Loader(data, order, threads=0, augment=[shift], seed=2).take(0, 40).inputs)
    assert torch.equal(data.tensors[0], image_set(40).tensors[0])


def test_shift_fills_with_zeros() -> None:
    image = torch.arange(1.0, 10.0).reshape(1, 3, 3)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = {(r, c): padded[:, r : r + 3, c : c + 3] for r in range(5) for c in range(5)}
    found = set()
    for seed in range(400):
        moved = shift(image, torch.Generator().manual_seed(seed), pixels=2)
        found |= {place for place, window in windows.items() if torch.equal(window, moved)}
    assert found == set(windows)
    assert shift(image[:, :1, :1], torch.Generator().manual_seed(0), pixels=3).shape == (1, 1, 1)


def test_flip_mirrors_half_of_the_images() -> None:
    image = torch.arange(9.0).reshape(1, 3, 3)
    flips = [torch.equal(flip(image, torch.Generator().manual_seed(s)), image.flip(-1)) for s in range(200)]
    assert 70 < sum(flips) < 130


def test_augmentations_by_name() -> None:
    assert augmentations(["shift", "flip"]) == [shift, flip]
    with pytest.raises(JobError, match="did you mean shift"):
        augmentations(["shfit"])


def test_prefetched_stream_is_started_once_per_epoch() -> None:
    """Prefetching past a still unknown end must not lose the position and require reading again."""
    for length in (100, 96, 97, 112, 24, 5):
        ahead = 1 if length > 24 else 2  # a round, and so an epoch, is at most 24 samples, and two are ahead
        for worker in range(3):
            data, order = Count(length), Order(None, shuffle=False)
            with Loader(data, order) as loader:
                run(loader, order, worker, 3, 8, 3 * length)
            assert order.length == length
            assert 3 <= data.begun <= 3 + ahead


def test_stream_read_backwards_is_restarted() -> None:
    data = Count(50, known=True)
    with Loader(data, Order(50, shuffle=False)) as loader:
        assert loader.take(40, 44).inputs.tolist() == [40, 41, 42, 43]
        assert loader.take(44, 46).inputs.tolist() == [44, 45]
        assert data.begun == 1
        assert loader.take(10, 12).inputs.tolist() == [10, 11]
        assert loader.take(103, 105).inputs.tolist() == [2003, 2004]
        assert data.begun == 3


class Guarded(IterableDataset[int]):
    """0, 1, 2, ...; records which threads read it, and whether two did at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.002)
        self.inside -= 1
        return 1


def test_stream_is_read_by_one_thread() -> None:
    data = Guarded()
    with Loader(data, Order(10**6, shuffle=False), threads=4, prefetch=4) as loader:
        past_probes(loader, 0)
        data.threads.clear()
        for start in range(0, 40, 10):
            loader.request(start, start + 10)
        loader.take(40, 50)  # not requested
        loader.bounds(50, 10, 2)
    assert data.most == 1
    assert len(data.threads) == 1
    assert all(name.startswith("hpctrain-data") for name in data.threads)


def test_endless_stream_is_not_kept_in_memory() -> None:
    data, order = Count(10**9), Order(None, shuffle=False)
    loader = Loader(data, order, threads=0)
    run(loader, order, 0, 2, 8, 20_000)
    assert loader._stream is not None
    assert len(loader._stream._ahead) <= 33


def test_resuming_within_a_stream_of_unknown_length() -> None:
    order = Order(None, shuffle=False)
    loader = Loader(Count(30), order, threads=0)
    bounds = loader.bounds(70, 8, 2)  # what was 10 in the third epoch
    assert list(bounds) == [70, 74, 78]
    assert loader.take(70, 74).inputs.tolist() == [2010, 2011, 2012, 2013]


class Failing(IterableDataset[int]):
    """A generator that raises after `good` samples; afterwards it looks exhausted."""

    def __init__(self, good: int) -> None:
        self.good = good

    def __iter__(self) -> Iterator[int]:
        yield from range(self.good)
        raise OSError("the disk is gone")


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("length", [None, 100])
def test_error_in_a_stream_is_not_its_end(threads: int, length: int | None) -> None:
    order = Order(length, shuffle=False)
    with Loader(Failing(20), order, threads=threads) as loader:
        with pytest.raises(OSError, match="the disk is gone"):
            run(loader, order, 0, 2, 4, 100)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.take(20, 24)
    assert order.length == length


def test_too_short_streams_are_refused() -> None:
    with pytest.raises(DataError, match="the stream ended after 20 samples in epoch 0, but its length is 30"):
        Loader(Count(20), Order(30), threads=0).take(18, 24)
    with pytest.raises(DataError, match="a stream with no samples"):
        Loader(Count(0), Order(None), threads=0).bounds(0, 8, 2)
