"""Data sets by name, their files, and how a job's data is split."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from hpctrain.data.digits import digits
from hpctrain.data.memory import known_targets
from hpctrain.data.mnist import mnist, read_idx
from hpctrain.data.splits import Splits, load_data, make_order, stratified
from hpctrain.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def job(data: Any, validation: float = 0.0, seed: int = 0, **options: Any) -> Any:
    """The parts of a job that load_data uses."""
    spec = SimpleNamespace(name="mine:data", options=options, validation=validation, resolve=lambda: data)
    return SimpleNamespace(data=spec, seed=seed)


def labelled(*counts: int) -> TensorDataset:
    """The given numbers of samples of class 0, 1, ..."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return TensorDataset(torch.arange(sum(counts)).float(), targets)


# -- digits ------------------------------------------------------------------------------------------------


def test_digits() -> None:
    splits = digits()
    images, targets = splits.train.tensors
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    test_images, test_targets = splits.test.tensors
    assert len(test_images) == 360
    both = torch.cat([targets, test_targets]).bincount()
    assert (test_targets.bincount() - both / 5).abs().max() < 1
    assert splits.validation is None


def test_digits_match_scikit_learn_with_a_fixed_test_part() -> None:
    loaded = pytest.importorskip("sklearn.datasets").load_digits()
    splits = digits()
    ours = torch.cat([splits.train.tensors[0], splits.test.tensors[0]]).flatten(1) * 16
    theirs = torch.from_numpy(loaded.data).float()
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    first = [row.tolist() for row in splits.test.tensors[0].flatten(1)[:5] * 16]
    assert [theirs.tolist().index(row) for row in first] == [2, 3, 11, 13, 15]


# -- MNIST -------------------------------------------------------------------------------------------------


def idx(array: Any) -> bytes:
    """An array of bytes in idx format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    header = bytes([0, 0, 8, array.ndim]) + sizes
    return header + bytes(array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny MNIST: 12 training images, 5 to test on; image i is all i, its label i modulo 10."""
    for part, count in (("train", 12), ("t10k", 5)):
        numbers = np.arange(count)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(numbers % 10)))
    return tmp_path


def test_mnist_from_idx_files(folder: Path) -> None:
    splits = mnist(path=str(folder))
    assert (len(splits.train), len(splits.test)) == (12, 5)
    image, target = splits.train[11]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image[0, 3, 4], torch.tensor((11 / 255 - 0.1307) / 0.3081))
    assert (target, target.dtype) == (1, torch.int64)
    assert len(mnist(path=str(folder), limit=7).train) == 7
    assert len(mnist(path=str(folder), limit=7).test) == 5


def test_mnist_is_found_through_the_environment(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    inner = tmp_path / "all" / "mnist"
    inner.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            file.rename(inner / file.name.replace("-idx", ".idx"))
    monkeypatch.setenv("HPCTRAIN_DATA", str(tmp_path / "all"))
    assert len(mnist().train) == 12
    monkeypatch.delenv("HPCTRAIN_DATA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all").rename(tmp_path / "data")
    assert len(mnist().train) == 12


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A function that replaces the content of a file in the folder."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def no_images(folder: Path) -> None:
    """A valid but empty training part."""
    (folder / IMAGES).write_bytes(idx(np.zeros((0, 28, 28))))
    (folder / LABELS).write_bytes(gzip.compress(idx(np.zeros(0))))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "magic": (
        rewrite(IMAGES, lambda data: b"\x89PNG" + data[4:]),
        "train-images-idx3-ubyte is not an idx file of bytes: it begins with 89504e47, where 00000803",
    ),
    "float type": (rewrite(IMAGES, lambda data: data[:2] + b"\x0d" + data[3:]), "it begins with 00000d03"),
    "empty": (rewrite(IMAGES, lambda data: b""), "it begins with nothing"),
    "header": (rewrite(IMAGES, lambda data: data[:9]), "is truncated: it ends within its header"),
    "truncated": (
        rewrite(IMAGES, lambda data: data[:-1]),
        r"is truncated: it holds 9407 bytes of data; its header says 9408 bytes \(12, 28, 28\)",
    ),
    "too long": (rewrite(IMAGES, lambda data: data + b"x"), r"is too long; its header says 9408 bytes \("),
    "huge sizes": (
        rewrite(IMAGES, lambda data: data[:4] + b"\xff" * 12 + data[16:]),
        "is truncated: it holds 9408 bytes of data; its header says 79228162458924105385300197375",
    ),
    "count": (
        rewrite(LABELS, lambda data: gzip.compress(idx(np.arange(9)))),
        "holds 12 images, but train-labels-idx1-ubyte.gz 9 labels",
    ),
    "label": (rewrite(LABELS, lambda data: gzip.compress(idx(np.arange(12) + 20))), "holds the label 31"),
    "bad gzip": (rewrite(LABELS, lambda data: b"<html>not found</html>"), "is not a complete gzip file"),
    "truncated gzip": (rewrite(LABELS, lambda data: data[:-9]), "is not a complete gzip file"),
    "corrupt gzip": (
        rewrite(LABELS, lambda data: data[:12] + b"\xff\xff\xff" + data[15:]),
        "is not a complete gzip",
    ),
    "swapped": (
        rewrite(IMAGES, lambda data: idx(np.arange(12))),
        r"holds an array of shape \(12,\); expected \(images, 28, 28\)",
    ),
    "small images": (
        rewrite(IMAGES, lambda data: idx(np.zeros((12, 27, 28)))),
        r"holds an array of shape \(12, 27, 28\); expected \(images, 28, 28\)",
    ),
    "no images": (no_images, "holds no images"),
    "missing": (
        lambda folder: (folder / LABELS).unlink(),
        r"no MNIST file train-labels-idx1-ubyte \(or train-labels-idx1-ubyte.gz, train-labels.idx1-ubyte, "
        r"train-labels.idx1-ubyte.gz\) in .*/mnist or .*; put it there, or set data.path, or HPCTRAIN_DATA",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_corrupt_mnist_files_are_named(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        mnist(path=str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_more_is_read_than_the_header_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may decompress to any length."""

    class Bomb(io.BytesIO):
        unpacked = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.unpacked += size
            assert self.unpacked < 1 << 24
            return super().read(size) or bytes(size)

    monkeypatch.setattr(Path, "open", lambda *_: Bomb(idx(np.zeros((3, 28, 28)))))
    with pytest.raises(DataError, match="is too long"):
        read_idx(Path("bomb"))


def test_missing_or_wrong_mnist_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the MNIST folder .*/nowhere does not exist; .* HPCTRAIN_DATA"):
        mnist(path=str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="/file is not a folder"):
        mnist(path=str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_idx(tmp_path / "none")
    wrong: Any
    for wrong in (0, -3, 2.5, "10", True):
        with pytest.raises(DataError, match="data.limit = .*: expected a whole number"):
            mnist(path=str(tmp_path), limit=wrong)
    wrong = 3
    with pytest.raises(DataError, match="data.path = 3"):
        mnist(path=wrong)


def test_real_mnist() -> None:
    places = [os.environ.get("HPCTRAIN_DATA"), REPOSITORY.parent / "shared" / "data"]
    found = [Path(place) for place in places if place and (Path(place) / "mnist").is_dir()]
    if not found:
        pytest.skip("no MNIST: neither HPCTRAIN_DATA nor ../shared/data has mnist/ in it")
    splits = mnist(path=str(found[0]))
    assert (len(splits.train), len(splits.test)) == (60_000, 10_000)
    inputs, targets = splits.train.gather(torch.arange(60_000))
    assert abs(inputs.mean()) < 0.01
    assert abs(inputs.std() - 1) < 0.01
    assert targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


# -- splits ------------------------------------------------------------------------------------------------


class Plain(Dataset[int]):
    """Ten numbers, without targets."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


class Endless(IterableDataset[int]):
    """1, 1, 1, ..."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class Lengthless(Dataset[int]):
    """A data set without a length."""

    def __getitem__(self, index: int) -> int:
        return index


def test_what_a_data_function_may_return() -> None:
    train, test = Plain(), Plain()
    assert load_data(job(lambda: train)).train is train
    assert load_data(job(Plain)).test is None
    for given in ((train, test), Splits(train, None, test), lambda: (train, test)):
        splits = load_data(job(given))
        assert (splits.train, splits.validation, splits.test) == (train, None, test)
    assert len(load_data(job(lambda count: list(range(count)), count=4)).train) == 4
    assert isinstance(load_data(job(Endless)).train, Endless)


def test_orders_of_data_set_kinds() -> None:
    assert make_order(Plain(), 3).length == 10
    assert make_order(Plain(), 3).shuffle
    assert make_order(Endless(), 3).length is None
    assert not make_order(Endless(), 3).shuffle


@pytest.mark.parametrize("validation", [0.1, 0.33])
def test_validation_split_depends_on_class_and_seed(validation: float) -> None:
    data = labelled(100, 50, 10)
    splits = load_data(job(data, validation, seed=1))
    assert len(splits.validation) == round(validation * 160)
    assert len(splits.train) + len(splits.validation) == 160
    together = {int(x) for part in (splits.train, splits.validation) for x, _ in part}
    assert len(together) == 160
    for seed in range(10):
        held = known_targets(load_data(job(data, validation, seed)).validation)
        assert held is not None
        assert (abs(np.bincount(held, minlength=3) - validation * np.array([100, 50, 10])) < 1).all()
    assert load_data(job(data, validation, seed=1)).validation.indices == splits.validation.indices
    assert load_data(job(data, validation, seed=2)).validation.indices != splits.validation.indices
    unknown = load_data(job(Plain(), 0.2))
    assert (len(unknown.train), len(unknown.validation)) == (8, 2)


def test_stratified_split_is_exact() -> None:
    targets = np.repeat([4, 7, 9], [1, 10, 23])
    for count in range(35):
        mask = stratified(targets, count, 0)
        assert mask.sum() == count
        shares = [mask[targets == one].sum() - count * (targets == one).sum() / 34 for one in (4, 7, 9)]
        assert max(np.abs(shares)) < 1


def test_known_targets() -> None:
    data = labelled(2, 3)
    assert known_targets(Subset(Subset(data, [4, 1, 0]), [2, 0])).tolist() == [0, 1]  # type: ignore[union-attr]
    assert known_targets(TensorDataset(torch.ones(3), torch.ones(3))) is None
    assert known_targets(Plain()) is None
    odd: Any = Plain()
    for targets, expected in (([1] * 10, [1] * 10), ([1] * 9, None), ("labels", None), ([[1], [1, 2]], None)):
        odd.targets = targets
        found = known_targets(odd)
        assert (None if found is None else found.tolist()) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (job(lambda: None), "returned a value that is of type NoneType; expected a torch Dataset"),
    "three": (job(lambda: (Plain(), Plain(), Plain())), "returned a value that is a tuple of 3"),
    "text": (job(lambda: "data"), "of type str"),
    "wrong test": (job(lambda: (Plain(), 3)), "its test part is of type int"),
    "no length": (job(Lengthless), "its train part, a Lengthless, has no length; give it __len__"),
    "empty": (job(list), "its train part is empty"),
    "unknown option": (
        job(mnist, limits=3),
        r"data.limits: .*no such option \(did you mean limit\?\); it takes path",
    ),
    "missing option": (job(lambda count: [count]), "missing a required argument: 'count'"),
    "object with options": (job(Plain(), limit=3), "data.limit: the data set was given as an object"),
    "all held back": (job(Plain(), 0.99), "data.validation = 0.99: of 10 training samples, that leaves 10 to"),
    "none held back": (job(Plain(), 0.01), "that leaves 0 to validate"),
    "held back twice": (job(Splits(Plain(), Plain()), 0.1), "has a validation part of its own"),
    "stream held back": (job(Endless, 0.1), "a stream cannot be split at random"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_data(case: str) -> None:
    wrong, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        load_data(wrong)


def test_data_function_error_passes_through() -> None:
    def broken() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        load_data(job(broken))
