"""What metrics return, and accuracy by the shapes of outputs and targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError
from hpctrain.job import Job
from hpctrain.models import losses, metrics
from hpctrain.models.metrics import Tally, accuracy, mean


def share(outputs: Tensor, targets: Tensor, **keys: Any) -> float:
    right, counted = accuracy(outputs, targets, **keys)
    return mean(float(right), float(counted))


def scores(classes: Tensor, count: int, dim: int) -> Tensor:
    """Outputs whose largest entry along `dim` is at `classes`."""
    generator = torch.Generator().manual_seed(0)
    hot = functional.one_hot(classes, count).movedim(-1, dim).float()
    return hot + 0.5 * torch.rand(hot.shape, generator=generator)


# -- accuracy ----------------------------------------------------------------------------------------------------
def test_one_class_per_sample() -> None:
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert share(outputs, torch.tensor([1, 0, 0, 0])) == 0.75
    assert share(outputs.bfloat16(), torch.tensor([1, 0, 1, 0])) == 1.0
    assert share(outputs, torch.tensor([1, -100, 0, -100])) == 0.5  # cross entropy's ignore_index
    assert share(outputs, torch.tensor([1, 0, 0, 0]), ignore_index=0) == 1.0
    assert math.isnan(share(outputs, torch.tensor([-100] * 4)))


@pytest.mark.parametrize("inner", [(), (5,), (3,), (3, 3), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("dim", [1, -1])
def test_classes_in_the_second_or_the_last_dimension(inner: tuple[int, ...], dim: int) -> None:
    classes = torch.randint(0, 3, (6, *inner), generator=torch.Generator().manual_seed(1))
    outputs = scores(classes, 3, dim)
    wrong = classes.clone()
    wrong[0] = (wrong[0] + 1) % 3
    unclear = bool(inner) and set(inner) == {3}
    if unclear:
        with pytest.raises(ModelError, match="may be in dimension 1 or in the last; say which by metric.dim"):
            accuracy(outputs, classes)
    for keys in [{"dim": dim}, {"unclear": dim}] if unclear else [{}, {"dim": dim}]:
        assert share(outputs, classes, **keys) == 1.0
        assert share(outputs, wrong, **keys) == pytest.approx(5 / 6)


def test_targets_that_are_probabilities() -> None:
    for shape in [(4, 3), (4, 3, 5), (4, 3, 3)]:
        classes = torch.randint(0, 3, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
        soft = scores(classes, 3, 1).softmax(1)
        assert share(scores(classes, 3, 1), soft) == 1.0
        assert share(-scores(classes, 3, 1), soft) < 0.5


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 1), (4,)), ((4,), (4, 1)), ((4, 1), (4, 1)), ((2, 2), (2, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_yes_or_no(shapes: tuple[Any, Any], dtype: torch.dtype) -> None:
    outputs = torch.tensor([-2.0, 0.2, 0.8, 3.0]).view(shapes[0])
    targets = torch.tensor([0, 1, 1, 0]).to(dtype).view(shapes[1])
    assert share(outputs, targets, threshold=0.0) == 0.75
    assert share(outputs, targets, threshold=0.5) == 0.5
    if shapes[0] != (2, 2) or dtype != torch.float32:
        with pytest.raises(ModelError, match=r"one output for each target.*set metric.threshold"):
            accuracy(outputs, targets)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ModelError, match=r"outputs of shape \(4, 3, 5\) and targets of shape \(4, 4\) do not fit"):
        accuracy(torch.zeros(4, 3, 5), torch.zeros(4, 4).long())
    with pytest.raises(ModelError, match=r"do not fit with metric.dim = 2"):
        accuracy(torch.zeros(4, 3, 5), torch.zeros(4, 5).long(), dim=2)
    with pytest.raises(ModelError, match=r"\(4, 3\) and targets of shape \(4,\) do not fit: with a threshold"):
        accuracy(torch.zeros(4, 3), torch.zeros(4), threshold=0.0)
    with pytest.raises(ModelError, match="was given a tuple and a NoneType"):
        accuracy((1, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "implied"),
    [
        ("cross_entropy", {"ignore_index": -100, "unclear": 1}),
        ({"name": "cross_entropy", "ignore_index": 7}, {"ignore_index": 7, "unclear": 1}),
        (nn.CrossEntropyLoss(ignore_index=3), {"ignore_index": 3, "unclear": 1}),
        ({"name": nn.NLLLoss, "ignore_index": 2}, {"ignore_index": 2, "unclear": 1}),
        ({"name": "cross_entropy", "ignore_index": 7, "reduction": "sum"}, {"ignore_index": 7, "unclear": 1}),
        (nn.BCEWithLogitsLoss, {"threshold": 0.0}),
        ({"name": functional.binary_cross_entropy_with_logits, "reduction": "mean"}, {"threshold": 0.0}),
        (nn.BCELoss(), {"threshold": 0.5}),
        ("mse", {}),
    ],
)
def test_accuracy_learns_from_the_loss(loss: Any, implied: dict[str, Any]) -> None:
    job = Job(loss=loss)
    bound = metrics.bind(job.metric, losses.bind(job.loss, torch.device("cpu")))
    assert bound.func is accuracy  # type: ignore[attr-defined]
    assert bound.keywords == implied  # type: ignore[attr-defined]
    job = Job(loss=loss, metric={"name": "accuracy", "ignore_index": 9})
    bound = metrics.bind(job.metric, losses.bind(job.loss, torch.device("cpu")))
    assert bound.keywords["ignore_index"] == 9  # type: ignore[attr-defined]


# -- what is added up --------------------------------------------------------------------------------------------
def test_means_pairs_and_dictionaries() -> None:
    plain, pairs, named = Tally("m"), Tally("m"), Tally("m")
    for value, weight in [(1.0, 3), (0.0, 1)]:
        plain.add(torch.tensor(value), weight)
        pairs.add((torch.tensor(value * 10), torch.tensor(10 * weight)), 99)
        named.add({"a": value, "b": (value, weight)}, weight)
    assert plain.first == (3.0, 4.0)
    assert pairs.first == (10.0, 40.0)
    assert named.first == (3.0, 4.0)
    assert (plain.named, pairs.named, named.named) == (False, False, True)
    assert World(1).run(named.entries) == [{"a": 0.75, "b": 0.25}]


def test_entries_of_ranks_that_had_no_batch() -> None:
    def body(comm: Communicator) -> dict[str, float]:
        tally = Tally("m")
        for _ in range(comm.rank):
            tally.add({"z": comm.rank, "a": (1.0, 0.0)}, 2)
        return tally.entries(comm)

    found = World(3).run(body)
    assert found[0]["z"] == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert math.isnan(found[0]["a"])  # nothing of it counted
    assert [list(entries) for entries in found] == [["z", "a"]] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(10), r'metric "m" returned a Tensor of shape \(10,\); it must return a number'),
        (None, "returned a NoneType; it must return a number"),
        ((1, 2, 3), "returned a tuple"),
        ((1.0, torch.zeros(2)), r"returned a Tensor of shape \(2,\)"),
        ({"f1": torch.zeros(3)}, r"returned a Tensor of shape \(3,\) under f1"),
        ({1: 0.5}, "keys must be texts"),
        ({}, "it must have the same keys, and one at least"),
    ],
)
def test_what_is_no_metric(value: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Tally("m").add(value, 4)


def test_keys_that_change() -> None:
    tally = Tally("m")
    tally.add({"a": 1.0, "b": 2.0}, 1)
    for other in [{"b": 2.0, "a": 1.0}, {"a": 1.0}, 3.0]:
        with pytest.raises(ModelError, match="the same keys"):
            tally.add(other, 1)
