"""Samples of any kind: collated into batches, moved to the device, in dtypes that models and losses can use."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from hpctrain.comm.virtual.world import World
from hpctrain.data.augment import flip
from hpctrain.data.collate import collate
from hpctrain.data.loader import Loader
from hpctrain.data.moving import casts, move
from hpctrain.data.order import Order
from tests import helpers

Parts = namedtuple("Parts", "left right")
CPU = torch.device("cpu")
UNSIGNED = [np.uint16, np.uint32, np.uint64]
INDICES = np.arange(3)


def as_inputs(value: Any, precision: torch.dtype = torch.float32) -> Any:
    return move(value, CPU, casts(precision)[0])


def as_targets(value: Any, precision: torch.dtype = torch.float32) -> Any:
    return move(value, CPU, casts(precision)[1])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3)[:, ::-1],
        np.arange(6.0).reshape(2, 3)[::-1].T,
        np.frombuffer(np.arange(6.0).tobytes()),  # read-only
        np.arange(6).astype(">f8"),
        np.arange(6).astype(">i2"),
        np.arange(6, dtype=np.longdouble),
        np.arange(6, dtype=np.float16),
        np.array([True, False]),
        np.zeros(3, np.dtype([("a", np.int8), ("b", np.float64)]))["b"],  # its stride is not a multiple of 8 bytes
        np.array(2.5),
        np.array(2, np.uint16),
        *[np.arange(6, dtype=kind) for kind in UNSIGNED],
    ],
)
@pytest.mark.filterwarnings("error")
def test_numpy_arrays_of_every_kind(array: Any) -> None:
    found = collate([array] * 3, INDICES)
    assert found.tolist() == [array.tolist()] * 3
    assert collate([(array, 1)] * 3, INDICES)[0].tolist() == [array.tolist()] * 3


def test_numbers() -> None:
    assert collate([np.float32(1.5)] * 2, INDICES[:2]).dtype == torch.float32
    assert collate([np.bool_(True)] * 2, INDICES[:2]).dtype == torch.bool
    assert collate([1.5, 2.5], INDICES[:2]).dtype == torch.float64
    assert collate([3, 4], INDICES[:2]).dtype == torch.int64


@pytest.mark.parametrize(
    "sample",
    [
        Parts(torch.ones(2), np.ones(2, np.float64)),
        {"a": torch.ones(2), "b": (1, "name")},
        OrderedDict(a=np.ones(2), b=[1.0, 2.0]),
        UserDict({"a": Parts(1.0, 2)}),
        (torch.ones(2), (np.ones(2), [1, 2.0])),
        [torch.ones(2), {"a": 1.0}],
    ],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_containers_keep_their_types(sample: Any, precision: torch.dtype) -> None:
    batch = collate([sample] * 3, INDICES)
    moved = as_inputs(batch, precision)
    assert shape_of(batch) == shape_of(moved) == shape_of(sample)
    assert all(tensor.dtype == precision for tensor in tensors_of(moved) if tensor.is_floating_point())
    theirs = tensors_of(default_collate([sample] * 3))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(batch), theirs, strict=True))


def shape_of(value: Any) -> Any:
    """The structure of containers without their contents."""
    if isinstance(value, (dict, UserDict)):
        return type(value), {key: shape_of(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and not all(isinstance(part, str) for part in value):
        return type(value), [shape_of(part) for part in value]
    return None


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, (dict, UserDict)) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_no_copy_when_no_cast_is_needed() -> None:
    batch = {"a": (torch.ones(2), torch.ones(2, dtype=torch.int32), "name")}
    assert as_inputs(batch) is batch
    assert as_targets(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_dtypes_of_inputs_and_targets() -> None:
    t, dtypes = torch, (torch.float32, torch.float64, torch.bfloat16)
    for given in (t.float16, t.bfloat16, t.float32, t.float64):
        assert [as_inputs(torch.ones(2, dtype=given), precision).dtype for precision in dtypes] == list(dtypes)
        found = [as_targets(torch.ones(2, dtype=given), precision).dtype for precision in dtypes]
        assert found == [t.float32, t.float64, t.float32 if given is t.float64 else given]
    assert as_inputs(torch.ones(2, dtype=t.complex128)).dtype == t.complex64
    for given, inputs in (
        (t.uint8, t.uint8), (t.int8, t.int8), (t.int16, t.int16), (t.int32, t.int32), (t.int64, t.int64),
        (t.uint16, t.int32), (t.uint32, t.int64), (t.uint64, t.int64),
    ):  # fmt: skip
        for precision in dtypes:
            assert as_inputs(torch.ones(2, dtype=given), precision).dtype == inputs
            assert as_targets(torch.ones(2, dtype=given), precision).dtype == t.int64
    assert as_targets(torch.ones(2, dtype=t.bool)).dtype == t.bool


@pytest.mark.parametrize("kind", UNSIGNED)
def test_unsigned_integers_in_memory(kind: Any) -> None:
    data = TensorDataset(torch.arange(6.0)[:, None], torch.from_numpy(np.arange(6, dtype=kind) + 60_000))
    batch = Loader(data, Order(6, shuffle=False)).take(2, 4)
    assert as_targets(batch.targets).tolist() == [60_002, 60_003]


def test_arrays_are_augmented() -> None:
    arrays = [(np.arange(6.0).reshape(1, 2, 3)[..., ::-1], 1)] * 8
    batch = Loader(arrays, Order(8), threads=0, augment=[flip]).take(0, 8)
    rows = {tuple(sample[0, 0].tolist()) for sample in batch.inputs}
    assert rows == {(0.0, 1.0, 2.0), (2.0, 1.0, 0.0)}
    assert batch.inputs.dtype == torch.float64


class Measured(Dataset[Any]):
    """Rows and named parts as NumPy, h5py or pandas give them."""

    def __init__(self, target: Any) -> None:
        self.rows = np.random.default_rng(0).normal(size=(20, 7))
        self.target = target

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return Parts(self.rows[index], self.rows[index, ::-1]), self.target(index % 3)


class Difference(nn.Module):
    """Uses the field names."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)

    def forward(self, x: Any) -> Tensor:
        out: Tensor = self.last(x.left - x.right)
        return out


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "mixed_bfloat16"])
def test_runs_on_numpy_types(tmp_path: Path, precision: str) -> None:
    """Classes of any integer type, and measured values; also evaluated."""
    soft = lambda i: np.eye(3)[i]  # noqa: E731
    for target, loss in ((np.uint8, "cross_entropy"), (np.uint16, "cross_entropy"), (np.int32, "cross_entropy"),
                         (soft, "mse"), (soft, "cross_entropy")):  # fmt: skip
        data = Measured(target)
        job = helpers.make_job(
            tmp_path, model=Difference, data=(data, data), loss=loss, metric="tests.helpers:no_metric",
            train={"epochs": 1, "batch_size": 4, "precision": precision},
        )  # fmt: skip
        results = World(2).run(partial(helpers.quiet_train, job=job))
        assert np.isfinite(results[0].metrics["loss"])
