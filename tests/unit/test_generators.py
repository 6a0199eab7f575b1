"""Global generators: samples draw independently of the fetching thread and never disturb the training loop."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random.mtrand
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hpctrain.comm.virtual.world import World
from hpctrain.data.generators import DrewError, Generators, NoDraws, kept, restore_texts, seed_all
from hpctrain.data.loader import PROBES, Loader
from hpctrain.data.order import Order, round_bounds
from hpctrain.errors import DataError
from hpctrain.job import Job
from tests import helpers

DRAW: dict[str, Callable[[], float]] = {
    "Python": lambda: random.gauss(0, 1),
    "NumPy": lambda: float(np.random.randn()),
    "torch": lambda: float(torch.randn(())),
    "reseeded": lambda: float(torch.manual_seed(5).initial_seed() + torch.randn(())),
}
GLOBAL = ["Python", "NumPy", "torch"]


def draw_all() -> list[float]:
    return [DRAW[kind]() for kind in GLOBAL]


class Noisy(Dataset[Any]):
    """Sample i is i plus random numbers, from sample `begins` on; records the fetching threads."""

    def __init__(self, kind: str, begins: int = 0, length: int = 60) -> None:
        self.kind, self.begins, self.length = kind, begins, length
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.threads.add(threading.current_thread().name.rstrip("0123456789_"))
        return torch.tensor([float(index), DRAW[self.kind]() if index >= self.begins else 0.0], dtype=torch.float64)


class NoisyMany(Noisy):
    """Fetches many samples at once."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class NoisyGather(Noisy):
    """Has its own gather method."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self[int(index)] for index in indices]), indices


class NoisyStream(IterableDataset[Any]):
    """Reads its samples in an order drawn at its start; from place `begins` on each sample draws too."""

    def __init__(self, kind: str, begins: int = 0, length: int = 60, known: bool = True) -> None:
        self.kind, self.begins, self.length = kind, begins, length
        if known:
            self.__class__ = NoisyKnownStream

    def __iter__(self) -> Iterator[Tensor]:
        first = DRAW[self.kind]() if self.begins == 0 else 0.0
        for place in range(self.length):
            yield torch.tensor([place + first, DRAW[self.kind]() if place >= self.begins else 0.0], dtype=torch.float64)


class NoisyKnownStream(NoisyStream):
    """A stream of known length."""

    def __len__(self) -> int:
        return self.length


def epoch_of(data: Any, training: list[str], threads: int, known: bool = True, **arguments: Any) -> Any:
    """(an epoch of samples, the training loop's own draws, the loader); prefetched as by a trainer."""
    seed_all(1)
    order, cursor, found, drawn = Order(data.length if known else None, seed=4), 0, [], []
    with Loader(data, order, threads=threads, seed=4, **arguments) as loader:
        while cursor < data.length:
            bounds = loader.bounds(cursor, 4, 1)
            found.append(loader.take(bounds[0], bounds[1]).inputs)
            cursor = bounds[-1]
            loader.request(*round_bounds(cursor, order.length, 4, 1))
            drawn += [DRAW[kind]() for kind in training]
    return torch.cat(found), [*drawn, draw_all()], loader


# -- the generators themselves -----------------------------------------------------------------------------------
def test_seeded_draws_repeat_and_differ_between_generators() -> None:
    for seed in (0, 1, 2**32, 2**64 - 1):
        seed_all(seed)
        first = draw_all()
        seed_all(seed)
        assert draw_all() == first
        seed_all(seed)
        words = {random.getrandbits(32), int(np.random.randint(2**32)), int(torch.randint(2**32, ()))}
        assert len(words) == 3
    seed_all(2**32)
    assert all(a != b for a, b in zip(draw_all(), first, strict=True))


def test_generator_states_are_restored() -> None:
    draw_all()  # leaves half a pair of normal numbers behind in Python and NumPy
    before = Generators.now()
    with suppress(ZeroDivisionError), kept():
        draw_all()
        raise ZeroDivisionError
    assert not Generators.now().differing(before)
    DRAW["torch"]()
    assert Generators.now().differing(before) == {"torch"}


@pytest.mark.parametrize("other", [np.random.MT19937(3), np.random.PCG64(3)])
def test_states_as_strings(other: Any) -> None:
    standard = numpy.random.mtrand.get_bit_generator()
    try:
        numpy.random.mtrand.set_bit_generator(other)
        draw_all()
        texts = Generators.now().texts()
        drawn = draw_all()[:2]
        draw_all()
        restore_texts(texts["random_python"], texts["random_numpy"])
        assert draw_all()[:2] == drawn
    finally:
        numpy.random.mtrand.set_bit_generator(standard)


def guarded(function: Callable[[], Any]) -> bool:
    """Whether a draw is stopped without drawing anything."""
    before = Generators.now()
    try:
        NoDraws(set()).run(function)
    except DrewError:
        assert not Generators.now().differing(before)
        return True
    return False


def swallowed() -> None:
    with suppress(BaseException):
        torch.rand(2)


def test_guard_stops_draws_from_torchs_generator() -> None:
    own = torch.Generator()
    assert guarded(lambda: torch.rand(2))
    assert guarded(lambda: torch.rand(2, generator=torch.default_generator))
    assert guarded(lambda: torch.nn.functional.dropout(torch.ones(3)))
    assert guarded(lambda: torch.ones(3).bernoulli_())
    assert guarded(lambda: torch.utils.data.random_split(torch.utils.data.TensorDataset(torch.zeros(2)), [1, 1]))
    assert guarded(swallowed)
    assert not guarded(lambda: torch.rand(2, generator=own) + torch.ones(2).normal_(generator=own))
    assert not guarded(lambda: torch.from_numpy(np.ones(3)).reshape(3, 1).numpy().sum())
    NoDraws(set()).run(lambda: _in_a_thread(lambda: torch.rand(2)))  # other threads may draw


def _in_a_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


# -- samples that draw -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [[], GLOBAL])
@pytest.mark.parametrize("kind", DRAW)
def test_same_samples_for_any_fetching_thread_and_training_undisturbed(kind: str, training: list[str]) -> None:
    alone = epoch_of(Noisy("Python", begins=99), training, 0)[1]
    for make in (Noisy, NoisyMany, NoisyGather):
        wanted, drawn, _ = epoch_of(make(kind), training, 0)
        assert len(wanted[:, 1].unique()) == len(wanted) or kind == "reseeded"
        assert drawn == alone
        for threads in (1, 3):
            data = make(kind)
            found, drawn, _ = epoch_of(data, training, threads)
            assert torch.equal(found, wanted)
            assert drawn == alone
            assert data.threads == {"MainThread"}


def test_draws_of_a_sample_depend_on_seed_epoch_and_index() -> None:
    data, order = Noisy("NumPy"), Order(60, shuffle=False)
    whole = Loader(data, order, threads=0, seed=1).take(0, 60).inputs
    assert torch.equal(Loader(data, order, threads=0, seed=1).take(20, 25).inputs, whole[20:25])
    assert not torch.equal(Loader(data, order, threads=0, seed=1).take(60, 120).inputs[:, 1], whole[:, 1])
    assert not torch.equal(Loader(data, order, threads=0, seed=2).take(0, 60).inputs[:, 1], whole[:, 1])


def test_data_set_without_draws_is_prefetched() -> None:
    for training in ([], ["torch"]):
        data = Noisy("torch", begins=99)
        found, _, _ = epoch_of(data, training, 1)
        assert data.threads == {"MainThread", "hpctrain-data"}
        assert sorted(found[:, 0].tolist()) == list(range(60))


@pytest.mark.parametrize("training", [[], ["torch"]])
@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize("make", [Noisy, NoisyMany])
def test_data_set_that_starts_drawing_in_a_thread(make: Any, kind: str, training: list[str]) -> None:
    """Its draws there are discarded, and from then on it is fetched inline."""
    wanted, alone, _ = epoch_of(make(kind, begins=52), training, 0)
    data = make(kind, begins=52)
    seen = set(Order(60, seed=4).indices(0, 4 * PROBES).tolist())
    assert max(seen) < 52, "it is to begin in a thread"
    found, drawn, loader = epoch_of(data, training, 1)
    assert torch.equal(found, wanted)
    assert drawn == alone
    assert data.threads == {"MainThread", "hpctrain-data"}
    assert loader._alone


def test_no_threads_beside_a_loop_drawing_from_python_or_numpy() -> None:
    for kind in ("Python", "NumPy"):
        data = Noisy("torch", begins=99)
        epoch_of(data, [kind], 1)
        assert data.threads == {"MainThread"}


@pytest.mark.parametrize("kind", GLOBAL)
def test_draws_of_the_training_loop_are_not_blamed_on_the_data(kind: str) -> None:
    """From then on torch's draws are guarded, and threads continue; with other generators there are no threads."""
    seed_all(1)
    data = Noisy("torch", begins=99)
    with Loader(data, Order(60, shuffle=False), threads=1) as loader:
        drawn = []
        for start in range(0, 60, 4):
            assert loader.take(start, start + 4).inputs[:, 0].tolist() == [start, start + 1, start + 2, start + 3]
            loader.request(start + 4, min(60, start + 8))
            drawn += [DRAW[kind]()] if start >= 20 else []
        assert loader._alone == (kind != "torch")
    seed_all(1)
    assert drawn == [DRAW[kind]() for _ in drawn]


def test_ambiguous_source_of_draws_is_refused() -> None:
    """Data and training loop start drawing in the same step, and alternate."""
    turn = threading.Barrier(2, timeout=30)

    class Late(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            if index == 30 and threading.current_thread() is not threading.main_thread():
                turn.wait()
                np.random.rand()
                turn.wait()
            return torch.tensor([float(np.random.rand() if index == 30 else 0)])

    with Loader(Late("NumPy"), Order(60, shuffle=False), threads=1) as loader:
        for start in (0, 1, 2):
            loader.take(start, start + 1)
        loader.request(30, 31)
        turn.wait()
        np.random.rand()
        turn.wait()
        with pytest.raises(DataError, match=r"NumPy's global generator was used .* set data.threads = 0"):
            loader.take(30, 31)


@pytest.mark.parametrize("training", [[], GLOBAL])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", DRAW)
def test_streams_that_draw(kind: str, known: bool, training: list[str]) -> None:
    alone = epoch_of(Noisy("Python", begins=99), training, 0)[1]
    wanted, drawn, _ = epoch_of(NoisyStream(kind, known=known), training, 0, known)
    assert drawn == alone
    found, drawn, _ = epoch_of(NoisyStream(kind, known=known), training, 1, known)
    assert torch.equal(found, wanted)
    assert drawn == alone


@pytest.mark.parametrize("known", [True, False])
def test_stream_that_starts_drawing_in_its_thread(known: bool) -> None:
    """Torch's generator: the stream is stopped and read again. Other generators: refused."""
    wanted, alone, _ = epoch_of(NoisyStream("torch", 30, known=known), ["torch"], 0, known)
    found, drawn, _ = epoch_of(NoisyStream("torch", 30, known=known), ["torch"], 1, known)
    assert torch.equal(found, wanted)
    assert drawn == alone
    with pytest.raises(DataError, match="Python's global generator"):
        epoch_of(NoisyStream("Python", 30, known=known), [], 1, known)


def test_augmentations_that_draw() -> None:
    def noise(sample: Tensor, generator: torch.Generator) -> Tensor:
        return sample + sum(draw_all()) + torch.rand((), generator=generator)

    for data in ([torch.zeros(2, dtype=torch.float64)] * 60, Noisy("Python", begins=99)):
        found = []
        for threads in (0, 1):
            seed_all(1)
            before = Generators.now()
            with Loader(data, Order(60, seed=4), threads=threads, augment=[noise], seed=4) as loader:
                for start in range(0, 60, 4):
                    found.append(loader.take(start, start + 4).inputs)
                    loader.request(start + 4, min(60, start + 8))
            assert not Generators.now().differing(before)
        assert torch.equal(torch.cat(found[:15]), torch.cat(found[15:]))


# -- runs --------------------------------------------------------------------------------------------------------
class NoisyNet(nn.Module):
    """Initialises and computes with numbers from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        with torch.no_grad():
            self.last.weight += sum(draw_all())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x + sum(draw_all()))
        return out


class NoisyPoints(Dataset[Any]):
    """Inputs (7,) and classes 0..2, with noise of all three generators."""

    def __init__(self, samples: int = 40) -> None:
        self.points = helpers.points(samples)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.points[index]
        return inputs + sum(draw_all()), target


def noisy_points() -> tuple[Dataset[Any], Dataset[Any]]:
    """A training part picked at random, and a test part."""
    picked = np.random.permutation(40)[:29].tolist()
    return torch.utils.data.Subset(NoisyPoints(), picked), NoisyPoints(11)


@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, {"name": "parameter_server", "mode": "sync"}])
def test_same_job_and_its_resumed_run_have_the_same_bits(tmp_path: Path, strategy: helpers.Tables) -> None:
    """Data, model, samples, computation and evaluations draw the same, whatever was drawn before."""
    name = "tests.unit.test_generators"
    job = helpers.make_job(
        tmp_path, model=f"{name}:NoisyNet", data=f"{name}:noisy_points", strategy=strategy,
        train={"steps": 9, "checkpoint_every": {"steps": 4}, "evaluate_every": {"steps": 3}, "keep_checkpoints": 9},
    )  # fmt: skip
    seed_all(1)
    whole = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0]
    first = (whole.folder / "model.safetensors").read_bytes()
    rows = [line.rsplit(",", 3)[1:] for line in (whole.folder / "metrics.csv").read_text().splitlines()]
    seed_all(2)
    again = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0]
    assert (again.folder / "model.safetensors").read_bytes() == first
    assert [line.rsplit(",", 3)[1:] for line in (again.folder / "metrics.csv").read_text().splitlines()] == rows
    helpers.forget_after(whole.folder, 0)
    seed_all(3)
    stored = Job.load(whole.folder / "job.toml")
    resumed = World(2).run(lambda comm: helpers.quiet_train(comm, stored, resume=whole.folder))[0]
    assert (resumed.folder / "model.safetensors").read_bytes() == first
    assert resumed.metrics == whole.metrics
