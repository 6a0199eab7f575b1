"""Accuracy for every shape of outputs and targets, and options it takes from the job's loss; balanced accuracy."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.errors import ModelError
from hpctrain.job import Job
from hpctrain.models import losses, metrics
from hpctrain.models.measures import Tally, mean
from hpctrain.models.metrics import BalancedAccuracy, accuracy


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
        with pytest.raises(ModelError, match="may be in dimension 1 or in the last; say which with metric.dim"):
            accuracy(outputs, classes)
    for keys in [{"dim": dim}, {"unclear": dim}] if unclear else [{}, {"dim": dim}]:
        assert share(outputs, classes, **keys) == 1.0
        assert share(outputs, wrong, **keys) == pytest.approx(5 / 6)


def test_probabilities_as_targets() -> None:
    for shape in [(4, 3), (4, 3, 5), (4, 3, 3)]:
        classes = torch.randint(0, 3, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
        soft = scores(classes, 3, 1).softmax(1)
        assert share(scores(classes, 3, 1), soft) == 1.0
        assert share(-scores(classes, 3, 1), soft) < 0.5


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 1), (4,)), ((4,), (4, 1)), ((4, 1), (4, 1)), ((2, 2), (2, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_binary_classification(shapes: tuple[Any, Any], dtype: torch.dtype) -> None:
    outputs = torch.tensor([-2.0, 0.2, 0.8, 3.0]).view(shapes[0])
    targets = torch.tensor([0, 1, 1, 0]).to(dtype).view(shapes[1])
    assert share(outputs, targets, threshold=0.0) == 0.75
    assert share(outputs, targets, threshold=0.5) == 0.5
    if shapes[0] != (2, 2) or dtype != torch.float32:
        with pytest.raises(ModelError, match=r"one output for each target.*set metric.threshold"):
            accuracy(outputs, targets)


def test_mismatched_shapes_are_named() -> None:
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
def test_accuracy_uses_options_of_the_loss(loss: Any, implied: dict[str, Any]) -> None:
    assert keywords(Job(loss=loss)) == implied
    assert keywords(Job(loss=loss, metric={"name": "accuracy", "ignore_index": 9}))["ignore_index"] == 9


def keywords(job: Job) -> dict[str, Any]:
    bound = metrics.bind(job.metric, losses.bind(job.loss, torch.device("cpu")))
    assert isinstance(bound, Tally)
    assert isinstance(bound.function, partial)
    assert bound.function.func is accuracy
    return bound.function.keywords


# -- balanced accuracy -------------------------------------------------------------------------------------------
def test_balanced_accuracy_is_that_of_scikit_learn_whoever_has_the_samples() -> None:
    balanced_accuracy_score = pytest.importorskip("sklearn.metrics").balanced_accuracy_score
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(3))
    targets = (drawn * drawn * 4).long()  # of five classes, the last of which does not occur
    outputs = torch.rand(200, 5, generator=torch.Generator().manual_seed(4)) + functional.one_hot(targets, 5) * 0.4
    outputs[:, 4] = -1.0
    ranks = [BalancedAccuracy() for _ in range(3)]
    for metric in ranks:
        metric.start()
    for metric, first, last in ((ranks[0], 0, 35), (ranks[0], 35, 70), (ranks[1], 70, 200)):
        metric.update(outputs[first:last], targets[first:last])
    assert [len(metric.state()["samples"]) for metric in ranks] == [5, 5, 0]  # the last had no batch
    ranks[0].merge([metric.state() for metric in ranks])
    expected = balanced_accuracy_score(targets, outputs.argmax(1))
    assert ranks[0].value() == pytest.approx(expected, abs=1e-12)
    assert abs(expected - float((outputs.argmax(1) == targets).double().mean())) > 0.001
    ranks[1].start()
    assert math.isnan(ranks[1].value())


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 3), (3,)), ((4, 3, 2), (4, 2))])
def test_balanced_accuracy_names_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    metric = BalancedAccuracy()
    metric.start()
    with pytest.raises(ModelError, match=r"balanced_accuracy: outputs of shape .* do not fit"):
        metric.update(torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64))
