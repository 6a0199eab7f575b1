"""The last round of an epoch: dropped if the job says so, and refused if batch norm cannot handle it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.order import Order
from hpctrain.errors import DataError, ModelError
from hpctrain.run.api import session
from hpctrain.run.folder import Narrator
from tests import helpers

SYNC, ASYNC = {"name": "all_reduce"}, helpers.served(colocated=True)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def sync_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.SyncBatchNorm(5), nn.Linear(5, 3))


def run(tmp_path: Path, samples: int, size: int = 2, **tables: Any) -> list[Any]:
    """Micro-batches of 4."""
    tables = {"model": "tests.unit.test_lastround:normed", **tables}
    keys = {"epochs": 2, "batch_size": 4, **tables.pop("train", {})}
    data = {"name": helpers.points(samples), **tables.pop("data", {})}
    job = helpers.make_job(tmp_path, data=data, train=keys, **tables)
    return World(size).run(lambda comm: helpers.quiet_train(comm, job))


@pytest.mark.parametrize(
    ("samples", "tables"),
    [
        (34, {}),  # rounds of 8, then one of 2
        (35, {}),  # 2 and 1
        (37, {"strategy": ASYNC}),  # stretches of 4, then one of 1
        (34, {"strategy": ASYNC, "data": {"queue": "static"}}),
        (34, {"model": "tests.unit.test_lastround:sync_normed"}),
        (36, {"train": {"batch_size": 1, "epochs": 1}}),
        (42, {"train": {"batch_size": 4, "accumulate": 2}}),  # rounds of 16, then one of 10: 5 each, 4 and 1
    ],
)
def test_batch_norm_with_one_sample_is_refused_before_training(
    tmp_path: Path, samples: int, tables: dict[str, Any]
):
    with pytest.raises(ModelError, match=r'layer 1 is batch norm .* data.last = "drop", choose another train.batch'):
        run(tmp_path, samples, **tables)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("samples", "tables"),
    [
        (36, {}),
        (34, {"data": {"last": "drop"}}),
        (37, {"strategy": ASYNC, "data": {"last": "drop"}}),
        (34, {"train": {"sync_batchnorm": True}}),
        (34, {"train": {"steps": 4}}),  # it does not reach the end of the epoch
        (34, {"model": "tests.helpers:net"}),
    ],
)
def test_other_last_rounds_are_accepted(tmp_path: Path, samples: int, tables: dict[str, Any]):
    if "steps" in tables.get("train", {}):
        tables = {**tables, "train": {"steps": 4, "epochs": None}}
    run(tmp_path, samples, **tables)


def test_images_have_enough_values_for_batch_norm(tmp_path: Path):
    """One sample of 6 x 6 values per channel is enough for batch norm; the check leaves no trace in the model."""
    images = TensorDataset(torch.randn(9, 1, 8, 8), torch.randint(3, (9,)))
    job = helpers.make_job(tmp_path, model="tests.helpers:noisy_net", data=images, train={"epochs": 1, "batch_size": 4})
    model = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0].model
    assert all(not module._forward_pre_hooks and module.training for module in model.modules())


@pytest.mark.parametrize("strategy", [SYNC, ASYNC])
def test_dropped_samples_differ_between_epochs(tmp_path: Path, strategy: helpers.Tables):
    def body(comm: Communicator) -> tuple[list[list[int]], int]:
        job = helpers.make_job(
            tmp_path, model=nn.Linear(1, 1), loss="mse", data={"name": helpers.Counted(29), "last": "drop"},
            metric="tests.helpers:no_metric", train={"epochs": 6, "batch_size": 3}, strategy=strategy,
        )  # fmt: skip
        seen: list[list[int]] = []
        with session(job, comm, out=Narrator(enabled=False)) as running:
            for batch in running.batches():
                seen += [[running.totals.cursor // 24, int(value)] for value in batch.inputs[:, 0]]
                running.step(running.loss(running.model(batch.inputs / 29), batch.targets))
        return seen, running.result.samples

    found = World(4).run(body)  # rounds of 12: 24 of 29
    assert {samples for _, samples in found} == {6 * 24}
    together = [value for seen, _ in found for _, value in seen]
    assert len(together) == 6 * 24
    assert set(together) == set(range(29))
    assert max(together.count(value) for value in set(together)) <= 6


@pytest.mark.parametrize("strategy", [SYNC, helpers.served(mode="sync", colocated=True)])
def test_resumed_run_drops_the_same_samples(tmp_path: Path, strategy: helpers.Tables):
    keys = {"name": "SGD", "lr": 0.01, "momentum": 0.9}
    World(3).run(lambda comm: helpers.resumed_bits(comm, tmp_path, strategy, keys, last="drop"))


def test_order_may_leave_samples_out():
    order = Order(24, seed=3, of=29)
    first, second = (order.indices(24 * epoch, 24 * epoch + 24).tolist() for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 24
    assert set(first) != set(second)
    assert set(first) | set(second) <= set(range(29))


def test_epoch_without_a_full_round_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match='data.last = "drop": an epoch has 7 samples, fewer than the 8 of one round'):
        run(tmp_path, 7, data={"last": "drop"})
