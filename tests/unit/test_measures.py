"""Metrics over several ranks: functions that are summed up, and classes that are not means over batches."""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.models import losses, metrics
from hpctrain.models.measures import METHODS, Measure, Tally
from hpctrain.models.packing import Packed, collect, pack, unpack
from hpctrain.run.evaluate import Evaluation, StandardJudge, evaluate
from tests import helpers


# -- two metrics that no mean of batches gives -------------------------------------------------------------------
class Bleu:
    """Corpus BLEU (Papineni et al. 2002) of sequences of tokens (n, length), padded with 0: counts add up."""

    def __init__(self, order: int = 4) -> None:
        self.order = order

    def start(self) -> None:
        self.matched, self.total = torch.zeros(self.order), torch.zeros(self.order)
        self.outputs = self.targets = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for own, other in zip(outputs.long().tolist(), targets.long().tolist(), strict=True):
            found, wanted = ([token for token in row if token] for row in (own, other))
            self.outputs += len(found)
            self.targets += len(wanted)
            for n in range(self.order):
                grams = grams_of(found, n + 1)
                self.matched[n] += (grams & grams_of(wanted, n + 1)).total()
                self.total[n] += grams.total()

    def state(self) -> dict[str, Any]:
        return {"matched": self.matched, "total": self.total, "outputs": self.outputs, "targets": self.targets}

    def merge(self, states: list[dict[str, Any]]) -> None:
        self.matched, self.total = (sum(state[key] for state in states) for key in ("matched", "total"))
        self.outputs, self.targets = (sum(state[key] for state in states) for key in ("outputs", "targets"))

    def value(self) -> dict[str, float]:
        precision = (self.matched / self.total).log().mean().exp()
        penalty = min(1.0, math.exp(1 - self.targets / self.outputs))
        return {"bleu": float(penalty * precision), "penalty": penalty}


def grams_of(tokens: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


class AveragePrecision:
    """The area under precision over recall: it needs all scores at once, sorted."""

    def start(self) -> None:
        self.scores: list[Tensor] = []
        self.labels: list[Any] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.scores.append(outputs[:, 0])
        self.labels.append(targets[:, 0].numpy() > 3)

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores, "labels": self.labels}

    def merge(self, states: list[dict[str, Any]]) -> None:
        self.scores = [part for state in states for part in state["scores"]]
        self.labels = [part for state in states for part in state["labels"]]

    def value(self) -> float:
        labels = np.concatenate(self.labels)[torch.cat(self.scores).argsort(descending=True, stable=True).numpy()]
        precision = labels.cumsum() / np.arange(1, len(labels) + 1)
        return float(precision[labels].mean())


def sentences(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(1, 6, (count, 9), generator=generator)
    targets[torch.rand(count, 9, generator=generator) < 0.2] = 0
    outputs = torch.where(torch.rand(count, 9, generator=generator) < 0.8, targets, 2)
    return TensorDataset(outputs.float(), targets.float())


def measure(spec: Any, data: Any, comm: Communicator, batch: int = 2) -> Evaluation:
    job = Job(metric=spec)
    metric = metrics.bind(job.metric, losses.bind(job.loss, torch.device("cpu")))
    judge = StandardJudge(nn.Identity(), no_loss, metric, nullcontext)
    return evaluate(judge, data, comm, batch, lambda each: each)


def no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("spec", [Bleu, {"name": f"{__name__}:Bleu", "order": 2}, AveragePrecision])
@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_ranks_compute_the_same_value_as_one_process(spec: Any, ranks: int) -> None:
    """Unequal shares; two of nine ranks have no batch."""
    data = sentences(7)
    cls, options = (spec, {}) if isinstance(spec, type) else (Bleu, {"order": 2})
    alone = cls(**options)
    alone.start()
    alone.update(*data.tensors)
    wanted = alone.value()
    for found in World(ranks).run(partial(measure, spec, data)):
        assert (found.entries or found.metric) == wanted
        assert found.metric == (wanted["bleu"] if isinstance(wanted, dict) else wanted)


def test_run_with_a_metric_class(tmp_path: Path) -> None:
    """Evaluated several times: nothing is left from the previous evaluation."""
    job = helpers.make_job(tmp_path, data=(helpers.points(), helpers.points(40)), metric=Spread)
    job = job.override(["train.evaluate_every={steps=2}"])
    results = World(3).run(partial(helpers.quiet_train, job=job))
    assert [result.metrics["metric"] for result in results] == [40.0] * 3


class Spread:
    """The number of samples."""

    def start(self) -> None:
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.count += len(targets)

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def merge(self, states: list[dict[str, Any]]) -> None:
        self.count = sum(state["count"] for state in states)

    def value(self) -> Any:
        return self.count


# -- what a class does wrong -------------------------------------------------------------------------------------
class Fails(Spread):
    """Fails in one method: in `update` on the rank whose samples start at 3, in `state` on the rank that had two."""

    def __init__(self, method: str) -> None:
        self.method = method

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        super().update(outputs, targets)
        if self.method == "update" and float(outputs[0, 0]) >= 3:
            raise ZeroDivisionError("nothing there")

    def state(self) -> Any:
        broken = {"names": {"n": 1}, "kinds": {"count": torch.zeros(1)}, "texts": {"count": "1"}, "none": None}
        return broken.get(self.method, super().state()) if self.count == 2 else super().state()

    def merge(self, states: list[dict[str, Any]]) -> None:
        if self.method == "merge":
            raise KeyError("scores")

    def value(self) -> Any:
        if self.method == "value":
            raise ValueError
        return {"shape": torch.zeros(3), "no keys": {}, "one": {"a": torch.zeros(3)}}.get(self.method, 1.0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("update", r"update\(\) failed in test_measures.py, line \d+: ZeroDivisionError: nothing there"),
        ("names", r"returned count \(number\) on rank 0, but n \(number\) on rank 2; it must return the same names"),
        ("kinds", r"returned count \(number\) on rank 0, but count \(Tensor\) on rank 2"),
        ("texts", r"state\(\) has under count a str; it may be a number, a tensor, an array"),
        ("none", r"state\(\) returned a NoneType; it must return a dictionary"),
        ("merge", r"merge\(\) failed in test_measures.py, line \d+: KeyError: 'scores'"),
        ("value", r"value\(\) failed in test_measures.py, line \d+: ValueError"),
        ("shape", r"value\(\) returned a Tensor of shape \(3,\); it must return a number"),
        ("no keys", r"value\(\) returned a dictionary with the keys \[\]; it must have at least one"),
        ("one", r"value\(\) returned a Tensor of shape \(3,\) under a; it must be a number"),
    ],
)
def test_metric_class_failing_on_one_rank_fails_on_all(method: str, words: str) -> None:
    data = TensorDataset(torch.arange(4.0)[:, None] + 1, torch.zeros(4, 1))  # shares of 1, 1 and 2

    def body(comm: Communicator) -> str:
        with pytest.raises(ModelError, match=words) as raised:
            measure({"name": f"{__name__}:Fails", "method": method}, data, comm)
        assert raised.value.everywhere
        comm.barrier()
        return str(raised.value)

    assert len(set(World(3).run(body))) == 1


def test_metric_function_failing_on_one_rank_fails_on_all() -> None:
    def metric(outputs: Tensor, targets: Tensor) -> Any:
        return None if float(outputs[0]) >= 3 else 1.0

    def body(comm: Communicator) -> None:
        with pytest.raises(ModelError, match="returned a NoneType; it must return a number"):
            measure(metric, TensorDataset(torch.arange(5.0), torch.zeros(5)), comm)
        comm.barrier()

    World(3).run(body)


@pytest.mark.parametrize("servers", [0, 1])
def test_failing_metric_ends_servers_too(tmp_path: Path, servers: int) -> None:
    """If all ranks raise an error, each ends by itself; an error that servers do not raise must end them."""
    strategy = {"name": "parameter_server", "mode": "sync", "servers": 1} if servers else {"name": "all_reduce"}
    data = (helpers.points(), helpers.points(9))
    metric = {"name": f"{__name__}:Fails", "method": "merge"}
    job = helpers.make_job(tmp_path, data=data, metric=metric, strategy=strategy)
    with pytest.raises(ModelError, match=r"merge\(\) failed") as raised:
        World(3).run(partial(helpers.quiet_train, job=job))
    assert raised.value.everywhere is (servers == 0)


class Lacking:
    def start(self) -> None: ...

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> float:
        return 0.0


class Unmade(Spread):
    def __init__(self) -> None:
        raise ValueError("no file of words")


def test_invalid_metric_classes_are_refused_before_training() -> None:
    def bind(spec: Any) -> Measure:
        return metrics.bind(Job(metric=spec).metric, no_loss)

    with pytest.raises(JobError, match=r"is a class without state\(\) and merge\(\) and value\(\); such a class has"):
        bind(Lacking)
    with pytest.raises(JobError, match=r"has no keyword depth; it takes order"):
        bind({"name": Bleu, "depth": 2})
    with pytest.raises(JobError, match=r"cannot be called as the job says: missing a required argument: 'method'"):
        bind(Fails)
    with pytest.raises(JobError, match=r"cannot be made: ValueError: no file of words"):
        bind(Unmade)
    with pytest.raises(HpctrainError, match="must be the metric's class, with its options beside it, not an instance"):
        bind(Bleu())
    assert all(callable(getattr(bind(Bleu), name)) for name in METHODS)


# -- what travels ------------------------------------------------------------------------------------------------
STATE: dict[str, Any] = {
    "flag": True, "count": 2**70, "share": np.float64(0.5), "none": float("inf"),
    "tensor": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(3), "bools": torch.tensor([True, False]), "complex": torch.tensor([1 + 2j]),
    "array": np.arange(5)[::-1], "zero": np.zeros((0, 4), np.float32),
    "tensors": [torch.zeros(0), torch.ones(2, 1, dtype=torch.float64)], "arrays": [np.ones(2), np.zeros(3, bool)],
    "empty": [],
}  # fmt: skip


def test_states_arrive_unchanged() -> None:
    found = unpack(pack(STATE, "it has"))
    assert list(found) == list(STATE)
    for name, value in found.items():
        pairs = zip(value, STATE[name], strict=True) if isinstance(value, list) else [(value, STATE[name])]
        for own, given in pairs:
            assert type(own) is type(given) or name == "share"
            if isinstance(own, Tensor):
                assert own.dtype == given.dtype
                assert torch.equal(own, given)
            else:
                assert getattr(own, "dtype", None) == getattr(given, "dtype", None) or name == "share"
                assert np.array_equal(own, given)


def test_states_of_any_lengths_come_to_rank_0_in_order() -> None:
    def body(comm: Communicator) -> list[Any]:
        state = {"rank": comm.rank, "rows": torch.full((2 * (comm.rank % 3),), comm.rank)}
        return collect(comm, pack(state, "it has"))

    first, *others = World(5).run(body)
    assert others == [[]] * 4
    assert [state["rank"] for state in first] == list(range(5))
    assert [state["rows"].tolist() for state in first] == [[], [1, 1], [2] * 4, [], [4, 4]]
    assert isinstance(pack({}, "it has"), Packed)


# -- functions -----------------------------------------------------------------------------------------------------
def fed(tally: Tally, *batches: tuple[Any, int]) -> Tally:
    """A function metric evaluated on batches whose outputs it returns."""
    tally.start()
    for measured, samples in batches:
        tally.update(measured, None, samples)
    return tally


def returned(outputs: Any, targets: Any) -> Any:
    return outputs


def test_means_pairs_and_dictionaries() -> None:
    assert fed(Tally("m", returned), (torch.tensor(1.0), 3), (torch.tensor(0.0), 1)).value() == 0.75
    assert fed(Tally("m", returned), ((torch.tensor(10.0), torch.tensor(30)), 99), ((0, 10), 99)).value() == 0.25
    named = fed(Tally("m", returned), ({"a": 1.0, "b": (1.0, 1)}, 3), ({"a": 0.0, "b": (0.0, 3)}, 1))
    assert named.value() == {"a": 0.75, "b": 0.25}
    assert fed(named, ({"z": 2.0}, 1)).value() == {"z": 2.0}
    nothing = fed(named).value()
    assert isinstance(nothing, float)
    assert math.isnan(nothing)


def test_entries_of_ranks_without_a_batch() -> None:
    tallies = [fed(Tally("m", returned), *[({"z": rank, "a": (1.0, 0.0)}, 2)] * rank) for rank in range(3)]
    tallies[0].merge([tally.state() for tally in tallies])
    found = tallies[0].value()
    assert isinstance(found, dict)
    assert list(found) == ["z", "a"]
    assert found["z"] == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert math.isnan(found["a"])  # nothing of it counted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(10), r'metric "m" returned a Tensor of shape \(10,\); it must return a number'),
        (None, "returned a NoneType; it must return a number"),
        ((1, 2, 3), "returned a tuple"),
        ((1.0, torch.zeros(2)), r"returned a Tensor of shape \(2,\)"),
        ({"f1": torch.zeros(3)}, r"returned a Tensor of shape \(3,\) under f1"),
        ({1: 0.5}, "keys must be strings"),
        ({}, "returned an empty dictionary; it must have at least one key"),
    ],
)
def test_invalid_metric_values_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        fed(Tally("m", returned), (value, 4))


def test_changing_metric_keys_are_refused() -> None:
    for other in [{"b": 2.0, "a": 1.0}, {"a": 1.0}, 3.0]:
        with pytest.raises(ModelError, match="the same keys"):
            fed(Tally("m", returned), ({"a": 1.0, "b": 2.0}, 1), (other, 1))
    first, second = (fed(Tally("m", returned), ({key: 1.0}, 1)) for key in "ab")
    with pytest.raises(ModelError, match=re.escape("different keys on different ranks")):
        first.merge([first.state(), second.state()])
