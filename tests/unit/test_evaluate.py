"""Evaluation: every sample once, over any number of workers, without side effects."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.loader import Batch
from hpctrain.errors import DataError
from hpctrain.job import Job
from hpctrain.models import losses, metrics
from hpctrain.models.measures import Measure, Tally
from hpctrain.run.api import session
from hpctrain.run.command import evaluate_run
from hpctrain.run.evaluate import StandardJudge, evaluate
from hpctrain.run.folder import COLUMNS, Narrator
from hpctrain.views.watch.evaluations import read_evaluations
from tests import helpers
from tests.marks import mostly_slow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Numbers(IterableDataset[Any]):
    """A stream of unknown length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield torch.tensor([float(number)]), torch.tensor([0.0])


class Measured(Numbers):
    def __len__(self) -> int:
        return self.count


def in_memory(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None], torch.zeros(count, 1))


def largest(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.sum() / len(outputs))


def unmoved(batch: Batch) -> Batch:
    return batch


def judge(loss: Any, metric: Measure) -> StandardJudge:
    return StandardJudge(nn.Identity(), loss, metric, nullcontext)


def measure(model: nn.Module, dataset: Any, comm: Communicator, batch_size: int = 4) -> tuple[float | None, float]:
    metric = Tally("largest", largest)
    found = evaluate(StandardJudge(model, mse_loss, metric, nullcontext), dataset, comm, batch_size, unmoved)
    return found.loss, found.metric


@pytest.mark.parametrize("kind", [in_memory, Numbers, Measured])
@pytest.mark.parametrize("count", [1, 3, 16, 37])
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_every_sample_once(kind: Any, count: int, ranks: int) -> None:
    """The means do not depend on the number of ranks, some of which may have no sample."""
    results = World(ranks).run(lambda comm: measure(nn.Identity(), kind(count), comm))
    squares = sum(number**2 for number in range(count)) / count
    assert results == [pytest.approx((squares, (count - 1) / 2))] * ranks
    assert len(set(results)) == 1


# -- what a metric returns -----------------------------------------------------------------------------------------
def counts(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """The largest output; the number of outputs; the mean of the even ones, weighted by their number."""
    even = outputs[outputs % 2 == 0]
    return {"mean": outputs.mean(), "ones": (len(outputs), len(outputs)), "even": (even.sum(), len(even))}


@pytest.mark.parametrize(("count", "ranks"), [(37, 3), (2, 5)])
def test_metric_entries_are_weighted_by_their_weights(count: int, ranks: int) -> None:
    data = in_memory(count)
    found = World(ranks).run(
        lambda comm: evaluate(judge(mse_loss, Tally("m", counts)), data, comm, 4, unmoved)
    )
    even = range(0, count, 2)
    wanted = {"mean": (count - 1) / 2, "ones": 1.0, "even": sum(even) / len(even)}
    assert [evaluation.entries for evaluation in found] == [pytest.approx(wanted)] * ranks
    assert [evaluation.metric for evaluation in found] == [pytest.approx((count - 1) / 2)] * ranks
    assert found[0].text("test", "counts")[1:] == [f"test {name} {value:.4f}" for name, value in wanted.items()]
    assert list(found[0].plain()) == ["loss", "metric", "metric.mean", "metric.ones", "metric.even"]


def test_ignored_tokens_have_no_weight_in_the_accuracy() -> None:
    """For sequences that are mostly padding: exact for any batches and ranks, as is the loss."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 4, (23, 6), generator=generator)
    outputs = torch.randn(23, 4, 6, generator=generator)
    targets[torch.rand(23, 6, generator=generator) < 0.6] = -100
    counted = targets != -100
    wanted = float((outputs.argmax(1) == targets)[counted].double().mean())
    job = Job()

    def by_batches(comm: Communicator, batch_size: int) -> Any:
        metric = metrics.bind(job.metric, losses.bind(job.loss, torch.device("cpu")))
        given = TensorDataset(outputs, targets)
        return evaluate(judge(mse_of_first, metric), given, comm, batch_size, unmoved)

    for ranks, batch_size in [(1, 1), (1, 23), (3, 2), (4, 5)]:
        found = World(ranks).run(partial(by_batches, batch_size=batch_size))
        assert [evaluation.metric for evaluation in found] == [pytest.approx(wanted, rel=1e-15)] * ranks


def mse_of_first(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0].square().mean()


# -- runs that are evaluated again -------------------------------------------------------------------------------
AR = {"name": "all_reduce"}
ASYNC = {"name": "parameter_server", "mode": "async"}
NOISY = {"model": "tests.helpers:noisy_net", "data": {"name": "tests.helpers:pictures"}}
AFTER = {"rule": "after", "steps": 3}
JOBS: dict[str, helpers.Tables] = {
    "a shared queue": {"strategy": ASYNC, "data": {"name": "tests.helpers:pictures", "queue": "shared"}},
    "phases": {"phases": [{"strategy": AR, "until": AFTER}, {"strategy": ASYNC}]},
    "a switch": {"strategy": {"name": "switch", "until": AFTER}},
    "batch norm over workers": {"train": {"sync_batchnorm": True}},
    "a slow rank": {"ranks": 4, "debug": {"slow": {3: 1.5}}},
    "a rule that needs evaluations": {
        "phases": [{"strategy": AR, "until": {"rule": "target", "metric": 2.0}}, {"strategy": AR}],
        "train": {"steps": 8, "evaluate_every": {"steps": 2}},
    },
    "an optimizer with groups": {"optimizer": {"name": "AdamW", "lr": 0.01, "groups": "decay", "schedule": "cosine"}},
    "bfloat16": {"train": {"precision": "bfloat16"}},
    "a dictionary": {"metric": {"name": f"{__name__}:scores"}},
    "validation only": {"data": {"name": "tests.helpers:points", "validation": 0.2}, "model": "tests.helpers:net"},
}  # fmt: skip


def scores(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    right = outputs.argmax(1) == targets
    return {"right": right.double().mean(), "zeros": (right[targets == 0].sum(), (targets == 0).sum())}


@pytest.mark.parametrize("what", mostly_slow(JOBS, list(JOBS)[::3]))
def test_evaluate_reproduces_the_metrics_of_any_job(tmp_path: Path, what: str) -> None:
    job = helpers.make_job(tmp_path, **{**NOISY, **JOBS[what]})
    result = World(4).run(lambda comm: helpers.quiet_train(comm, job))[0]
    lines = dict(line.rsplit(" ", 1) for line in evaluate_run(result.folder))
    split = "validation" if what == "validation only" else "test"
    rounding = 0.01 if what == "bfloat16" else 6e-5  # other batches, other sums
    assert float(lines[f"{split} loss"]) == pytest.approx(result.metrics["loss"], abs=rounding)
    first = f"{split} right" if what == "a dictionary" else f"{split} accuracy"
    assert float(lines[first]) == pytest.approx(result.metrics["metric"], abs=6e-5)
    if what == "a dictionary":
        assert list(result.metrics) == ["loss", "metric", "metric.right", "metric.zeros"]
        rows = list(csv.DictReader((result.folder / "metrics.csv").open()))
        assert [float(row["metric.right"]) for row in rows] == [float(row["metric"]) for row in rows]
        assert float(rows[-1]["metric.zeros"]) == pytest.approx(result.metrics["metric.zeros"], abs=1e-5)
        assert list(rows[0]) == [*COLUMNS, "metric.right", "metric.zeros"]
        watched = read_evaluations(result.folder / "metrics.csv")
        assert [evaluation.metric for evaluation in watched] == [float(row["metric"]) for row in rows]


def test_gpu_run_is_evaluated_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = helpers.make_job(tmp_path, **NOISY)
    result = World(1).run(lambda comm: helpers.quiet_train(comm, job))[0]
    text = (result.folder / "job.toml").read_text()
    (result.folder / "job.toml").write_text(text.replace('device = "auto"', 'device = "cuda"'))
    monkeypatch.setattr("hpctrain.run.prepare.usable_gpus", lambda: (0, "there is no GPU"))
    assert evaluate_run(result.folder)[0] == f"test loss {result.metrics['loss']:.4f}"


def test_evaluate_does_not_import_the_strategy(tmp_path: Path) -> None:
    job = helpers.make_job(tmp_path, **NOISY)
    folder = World(1).run(lambda comm: helpers.quiet_train(comm, job))[0].folder
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace('name = "all_reduce"', 'name = "nowhere_to_be_found:Strategy"'))
    assert len(evaluate_run(folder)) == 2


# -- batches ---------------------------------------------------------------------------------------------------------
class Series(Dataset[Any]):
    """Sequences of different lengths, which collate only in batches of one."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3 + index % 5, 7), 0.1 * index), index % 3


class LastOf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.line = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.seen.append(len(x))
        out: Tensor = self.line(x[:, -1] if x.dim() == 3 else x)
        return out


def test_evaluation_batch_size_is_the_trainings_or_evaluate_batch(tmp_path: Path) -> None:
    alone = helpers.make_job(tmp_path, model=LastOf, data=(Series(), Series()), train={"epochs": 1, "batch_size": 1})
    result = World(2).run(lambda comm: helpers.quiet_train(comm, alone))[0]
    assert result.model.seen == [1] * 6
    keys = {"steps": 2, "batch_size": 4, "evaluate_batch": 30}
    data = helpers.points()
    for train, sizes in [(keys, [30, 30, 30, 13]), ({**keys, "evaluate_batch": None}, [4] * 25 + [3])]:
        job = helpers.make_job(tmp_path, model=LastOf, data=(data, data), train=train)
        result = World(1).run(partial(helpers.quiet_train, job=job))[0]
        assert result.model.seen == sizes


# -- samples that are not pairs --------------------------------------------------------------------------------------
class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(7, 3)

    def forward(self, given: Any) -> Tensor:
        x, mask = given
        out: Tensor = self.line(x * mask)
        return out


def triples() -> TensorDataset:
    inputs, targets = helpers.points(24).tensors
    return TensorDataset(inputs, torch.ones(24, 7), targets)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, mask, y = triples()[index]
        return (x, mask), y


def test_samples_of_three_items_are_refused_with_advice(tmp_path: Path) -> None:
    job = helpers.make_job(tmp_path, model=Masked, data=(triples(), triples()), train={"steps": 2, "batch_size": 4})
    words = r"samples are of 3 items each, not pairs .* ValueError: .*; return \(\(x, mask\), y\) for two inputs, or"
    with pytest.raises(DataError, match=words):
        World(2).run(lambda comm: helpers.quiet_train(comm, job))
    pairs = helpers.make_job(tmp_path, model=Masked, data=(Pairs(), Pairs()), train={"steps": 2, "batch_size": 4})
    assert World(2).run(lambda comm: helpers.quiet_train(comm, pairs))[0].samples == 16


def test_custom_loop_takes_samples_of_three_items(tmp_path: Path) -> None:
    job = helpers.make_job(tmp_path, model=Masked, data=triples(), train={"steps": 2, "batch_size": 4})

    def body(comm: Communicator) -> int:
        with session(job, comm, out=Narrator(enabled=False)) as running:
            for batch in running.batches():
                x, mask, y = batch.inputs
                running.step(running.loss(running.model((x, mask)), y))
        return running.result.samples

    assert World(2).run(body) == [16, 16]


def test_model_returning_its_own_loss_takes_any_samples(tmp_path: Path) -> None:
    class Own(Masked):
        def forward(self, given: Any) -> Tensor:
            x, mask, y = given
            return nn.functional.cross_entropy(super().forward((x, mask)), y)

    job = helpers.make_job(
        tmp_path, model=Own, data=(triples(), triples()), loss=lambda outputs, targets: outputs,
        metric=lambda outputs, targets: outputs, train={"steps": 2, "batch_size": 4},
    )  # fmt: skip
    found = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0]
    assert found.metrics["loss"] == pytest.approx(found.metrics["metric"])


def test_evaluation_changes_nothing() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            torch.rand(3)
            out: Tensor = self.norm(self.frozen(x))
            return out

    def body(comm: Communicator) -> None:
        torch.manual_seed(comm.rank)
        model = Noisy().train()
        model.frozen.eval()
        modes = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        measure(model, in_memory(9), comm)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.grad is None for p in model.parameters())
        assert torch.is_grad_enabled()

    World(2).run(body)


def test_training_mode_is_restored_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Broken().train()
    with pytest.raises(ZeroDivisionError):
        World(1).run(lambda comm: measure(model, in_memory(3), comm))
    assert model.training
