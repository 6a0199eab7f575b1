"""train.sync_batchnorm: the workers' layers normalise like one process with all samples."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hpctrain import Job
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, ModelError
from hpctrain.replica.batchnorm import BatchNorms
from hpctrain.run.api import session, train
from hpctrain.run.folder import Narrator
from tests.marks import slow

QUIET = Narrator(enabled=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Branches(nn.Module):
    """Two branches that join again: their backward passes are ready at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.main, self.main_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.past, self.past_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.main_norm(self.main(x)) + self.past_norm(self.past(x))).relu()
        out: Tensor = self.head(x.flatten(1))
        return out


def samples(count: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 1, 4, 4, generator=generator) * 2 + 1
    return TensorDataset(inputs, torch.randint(0, 3, (count,), generator=generator))


def trained(tmp_path: Path, ranks: int, batch: int, count: int, strategy: Any = "all_reduce", **more: Any) -> list[Any]:
    """The state_dicts of all ranks after a little more than two epochs."""
    job = Job(
        model=Branches,
        data=partial(samples, count),
        optimizer={"name": "SGD", "lr": 0.05, "momentum": 0.9},
        train={"steps": 11, "batch_size": batch, "precision": "float64", "sync_batchnorm": True, **more},
        strategy=strategy,
        output=str(tmp_path),
        trace={"enabled": False},
    )
    results = World(ranks).run(lambda comm: train(job, comm, out=QUIET))
    assert type(results[0].model.norm) is nn.BatchNorm2d  # torch's own layer again
    return [result.model.state_dict() for result in results]


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert list(found) == list(wanted)
    pairs = [(found[name].double(), value.double()) for name, value in wanted.items()]
    return max(float((a - b).norm() / (b.norm() + 1e-300)) for a, b in pairs)


STRATEGIES: list[tuple[int, Any]] = [
    (2, "all_reduce"),
    (3, {"name": "all_reduce", "exchange": "message"}),
    (4, {"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.001}),
    (4, "all_reduce"),
    (6, {"name": "parameter_server", "mode": "sync", "servers": 2}),
    (3, {"name": "parameter_server", "mode": "sync", "servers": 1, "colocated": True}),
]


@pytest.mark.parametrize("count", [37, slow(38), slow(46)])  # the last round: 1 sample, 2, 10
@pytest.mark.parametrize(("ranks", "strategy"), STRATEGIES)
def test_equals_one_process_with_the_whole_batch(tmp_path: Path, ranks: int, strategy: Any, count: int) -> None:
    workers = 4 if ranks == 6 else ranks
    alone = trained(tmp_path, 1, 12, count)[0]
    together = trained(tmp_path, ranks, 12 // workers, count, strategy)
    assert error(together[0], alone) < 1e-9
    for other in together[1:workers]:
        assert all(torch.equal(other[name], value) for name, value in together[0].items())


def test_more_workers_than_samples(tmp_path: Path) -> None:
    """Some workers never have a sample."""
    assert error(trained(tmp_path, 5, 1, 3)[0], trained(tmp_path, 1, 3, 3)[0]) < 1e-9


def test_uneven_micro_batches(tmp_path: Path) -> None:
    """The last round's 13 samples: shares of 4, 3, 3 and 3, so of 2, 1, 1 and 1 micro-batches of 3."""
    states = trained(tmp_path, 4, 3, 24 + 13, accumulate=2)
    assert all(torch.isfinite(value).all() for value in states[0].values())
    again = trained(tmp_path, 4, 3, 24 + 13, accumulate=2)
    assert all(torch.equal(again[0][name], value) for name, value in states[0].items())


def test_every_sample_counts_once(tmp_path: Path) -> None:
    job = Job(
        model=Branches,
        data=partial(samples, 38),
        train={"epochs": 2, "batch_size": 3, "sync_batchnorm": True},
        output=str(tmp_path),
        trace={"enabled": False},
    )

    def body(comm: Communicator) -> list[int]:
        sizes = []
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                sizes.append(batch.size)
                assert len(batch.inputs) == max(1, batch.size)
                running.step(running.loss(running.model(batch.inputs), batch.targets))
        return sizes

    sizes = World(4).run(body)
    assert sum(map(sum, sizes)) == 2 * 38
    assert len({len(row) for row in sizes}) == 1
    assert 0 in sizes[3]


def on_ranks(parts: list[Tensor], layer: nn.Module, scale: Tensor, counted: list[bool] | None = None) -> list[Any]:
    """(output, gradients of input, weight and bias, layer) of every rank, each with its own part of the batch."""
    copies = [copy.deepcopy(layer) for _ in parts]
    scales = scale.split([len(part) for part in parts]) if counted is None else [scale[: len(p)] for p in parts]

    def body(comm: Communicator) -> Any:
        model, x = copies[comm.rank], parts[comm.rank].clone().requires_grad_()
        norms = BatchNorms(model)
        norms.join(comm)
        norms.counted = counted is None or counted[comm.rank]
        out = model(x)
        norms.backward((out * scales[comm.rank] * norms.counted).sum())
        norms.leave()
        norms.restore()
        assert x.grad is not None
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return out.detach(), x.grad, gradients, model

    return World(len(parts)).run(body)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 4), (3, 2, 2, 2)])
def test_forward_and_backward_of_each_kind(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    layer: nn.Module = kind(3).double()
    x = torch.randn(9, *shape, dtype=torch.float64) * 5 + 1000
    scale = torch.randn_like(x)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    whole, alone = x.clone().requires_grad_(), copy.deepcopy(layer)
    out = alone(whole)
    (out * scale).sum().backward()
    found = on_ranks(list(x.split([1, 5, 3])), layer, scale)
    torch.testing.assert_close(torch.cat([row[0] for row in found]), out.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([row[1] for row in found]), whole.grad, rtol=1e-10, atol=1e-11)
    for index, p in enumerate(alone.parameters()):
        torch.testing.assert_close(sum(row[2][index] for row in found), p.grad, rtol=1e-10, atol=1e-10)
    for row in found:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(row[3].state_dict()[name], value, rtol=1e-13, atol=0)
            assert torch.equal(row[3].state_dict()[name], found[0][3].state_dict()[name])


def test_borrowed_sample_leaves_no_trace() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    layer, scale = nn.BatchNorm1d(3).double(), torch.randn(6, 3, dtype=torch.float64)
    alone, whole = copy.deepcopy(layer), x.clone().requires_grad_()
    (alone(whole) * scale).sum().backward()
    found = on_ranks([x, x[2:3] * 100], layer, scale, counted=[True, False])
    torch.testing.assert_close(found[0][1], whole.grad, rtol=1e-11, atol=1e-12)
    assert not found[1][1].any()
    assert not any(gradient.any() for gradient in found[1][2])
    torch.testing.assert_close(found[1][3].running_mean, alone.running_mean)


def test_half_precision() -> None:
    layer, x = nn.BatchNorm2d(3).to(torch.bfloat16), (torch.randn(8, 3, 4, 4) + 20).to(torch.bfloat16)
    found = on_ranks(list(x.split([3, 5])), layer, torch.ones_like(x))
    out = torch.cat([row[0] for row in found])
    torch.testing.assert_close(out, nn.BatchNorm2d(3)(x.float()).to(torch.bfloat16), rtol=1e-2, atol=1e-2)


def test_autocast_on_virtual_ranks(tmp_path: Path) -> None:
    """torch caches casts of weights while any thread is in autocast; they must not survive a weight update."""
    one = trained(tmp_path, 1, 12, 48, precision="mixed_bfloat16", steps=4)[0]
    four = trained(tmp_path, 4, 3, 48, precision="mixed_bfloat16", steps=4)[0]
    assert error({"w": four["stem.weight"]}, {"w": one["stem.weight"]}) < 0.05


def test_evaluation_mode_and_parameter_names_match_torch() -> None:
    model, x = Branches(), torch.randn(4, 1, 4, 4)
    before, names = model.eval()(x), list(model.state_dict())

    def body(comm: Communicator) -> None:
        mine = copy.deepcopy(model)
        norms = BatchNorms(mine)
        norms.join(comm)
        if comm.rank == 0:  # on one rank alone: nothing may be collective
            assert torch.equal(mine.eval()(x), before)
        assert list(mine.state_dict()) == names
        assert isinstance(mine.norm, nn.BatchNorm2d)

    World(2).run(body)


def test_layer_in_evaluation_mode_does_not_communicate() -> None:
    layer = nn.BatchNorm1d(2)
    layer.eval()
    x = torch.arange(8.0).view(4, 2)
    found = on_ranks(list(x.split(2)), layer, torch.ones_like(x))
    torch.testing.assert_close(found[0][0], x[:2], rtol=1e-4, atol=1e-4)


def test_single_value_per_channel_is_an_error_on_all_ranks() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        on_ranks([torch.randn(1, 3), torch.randn(1, 3)], nn.BatchNorm1d(3), torch.ones(1, 3), counted=[True, False])


def test_failing_backward_pass_ends_the_world() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise ZeroDivisionError("in backward")

    def body(comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        norms = BatchNorms(model)
        norms.join(comm)
        x = model(torch.randn(3, 2))
        norms.backward((Broken.apply(x) if comm.rank else x).sum())

    with pytest.raises(ZeroDivisionError, match="in backward"):
        World(3).run(body)


def test_copied_layers_use_the_same_workers() -> None:
    def body(comm: Communicator) -> float:
        model: Any = nn.Sequential(nn.BatchNorm1d(2))
        norms = BatchNorms(model)
        norms.join(comm)
        twin = copy.deepcopy(model)
        twin(torch.full((2, 2), float(comm.rank)))
        norms.leave()
        return float(twin[0].running_mean[0])

    assert World(2).run(body) == pytest.approx([0.05, 0.05])


def test_moments_are_combined_without_cancelling() -> None:
    def body(comm: Communicator) -> Any:
        norms = BatchNorms(nn.BatchNorm1d(1))
        norms.join(comm)
        x = np.array([1e9, 1e9 + 2.0]) + comm.rank
        return norms.moments(2, x.mean(keepdims=True), ((x - x.mean()) ** 2).sum(keepdims=True))

    count, mean, variance = World(2).run(body)[1]
    assert (count, mean[0], variance[0]) == (4, 1e9 + 1.5, 1.25)


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnCheck(nn.BatchNorm2d):
    """Accepts any input, like timm's."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def test_subclasses() -> None:
    layer = OwnCheck(3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    found = on_ranks(list(x.split(2)), layer, torch.ones_like(x))
    torch.testing.assert_close(torch.cat([row[0] for row in found]), layer(x))
    assert type(found[0][3]) is OwnCheck
    with pytest.raises(ModelError, match=r"layer 0 is a OwnForward with its own forward"):
        BatchNorms(nn.Sequential(OwnForward(3)))


def test_torch_sync_batchnorm_layer_is_synchronised_too() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    whole = nn.BatchNorm1d(3).double()
    found = on_ranks(list(x.split(2)), nn.SyncBatchNorm(3).double(), torch.ones_like(x))
    torch.testing.assert_close(torch.cat([row[0] for row in found]), whole(x))
    assert type(found[0][3]) is nn.SyncBatchNorm


def test_sync_batch_norm_layers_without_the_key_are_reported(tmp_path: Path) -> None:
    """Such a layer would synchronise in torch.distributed, but does not here."""
    reported = []
    for tables in ({}, {"sync_batchnorm": True}):
        out = io.StringIO()
        job = Job(
            model=lambda: nn.Sequential(nn.Flatten(), nn.SyncBatchNorm(16), nn.Linear(16, 3)), data=samples(16),
            train={"steps": 1, "batch_size": 4, **tables}, output=str(tmp_path), trace={"enabled": False},
        )  # fmt: skip
        World(2).run(partial(train, job, out=Narrator(out=out)))
        reported.append("1 is a SyncBatchNorm layer, which normalises over each worker's own samples" in out.getvalue())
    assert reported == [True, False]


def test_model_without_batch_norm_is_refused(tmp_path: Path) -> None:
    job = Job(train={"sync_batchnorm": True}, output=str(tmp_path))
    with pytest.raises(HpctrainError, match="has no torch.nn.BatchNorm1d"):
        World(1).run(lambda comm: train(job, comm, out=QUIET))
