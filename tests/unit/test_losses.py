"""Valid losses, their weights, and how invalid losses are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, ModelError
from hpctrain.job.measuring import Loss
from hpctrain.models import losses
from hpctrain.models.losses import weigh
from tests import helpers

CPU = torch.device("cpu")


def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the targets that are not class 0, and their number."""
    counted = targets != 0
    return functional.cross_entropy(outputs[counted], targets[counted], reduction="sum"), counted.sum()


def as_number(outputs: Tensor, targets: Tensor) -> float:
    return functional.cross_entropy(outputs, targets).item()


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets).detach()


def by_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def three(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (functional.cross_entropy(outputs, targets),) * 3


def negative(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    return functional.cross_entropy(outputs, targets), -1.0


class Scaled(nn.Module):
    """A loss with its own temperature."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()), requires_grad=trained)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs / self.temperature, targets)


def bound(spec: Any) -> losses.LossFunction:
    return losses.bind(Loss.model_validate(spec), CPU)


@pytest.mark.parametrize(
    "spec",
    [
        "cross_entropy",
        "torch.nn:CrossEntropyLoss",
        {"name": "torch.nn:CrossEntropyLoss", "ignore_index": 1, "weight": [1.0, 2.0, 0.25]},
        {"name": "torch.nn:CrossEntropyLoss", "ignore_index": 1, "label_smoothing": 0.1},
        {"name": "cross_entropy", "weight": [1.0, 2.0, 0.25], "label_smoothing": 0.1},
        nn.CrossEntropyLoss(ignore_index=2),
        nn.NLLLoss(weight=torch.tensor([1.0, 0.5, 2.0]), ignore_index=0),
    ],
)
@pytest.mark.parametrize("shape", [(8,), (8, 5), (8, 2, 3)])
def test_class_losses_of_parts_add_up_to_the_whole(spec: Any, shape: tuple[int, ...]):
    """Over micro-batches, sums divided by weights equal torch's loss of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(8, 3, *shape[1:], generator=generator, dtype=torch.float64)
    targets = torch.randint(3, shape, generator=generator)
    loss = bound(spec)
    whole = weigh(loss(outputs, targets), 8)
    parts = [weigh(loss(outputs[a:b], targets[a:b]), b - a) for a, b in ((0, 1), (1, 6), (6, 8))]
    weight = sum(part.weight for part in parts)
    assert weight == pytest.approx(whole.weight, rel=1e-12)
    assert sum(part.total for part in parts) == pytest.approx(whole.total, rel=1e-12)
    assert sum(float(part.term) * part.share for part in parts) == pytest.approx(whole.total, rel=1e-12)


def test_pair_without_weight_counts_in_the_total():
    """As of a detector on pictures without objects: the means of more batches must not depend on how they are cut."""
    assert weigh((torch.tensor(3.0), 0), 4).total == 3.0
    assert weigh((torch.tensor(3.0), 0), 0).total == 0.0


def test_batch_without_counting_targets_has_no_weight_and_no_gradient():
    outputs = torch.randn(4, 3, requires_grad=True)
    found = weigh(bound("cross_entropy")(outputs, torch.full((4,), -100)), 4)
    assert (found.total, found.weight) == (0.0, 0.0)
    (found.term * found.share).backward()
    assert outputs.grad is not None
    assert not outputs.grad.any()


def test_probabilities_and_other_losses_are_means_over_samples():
    outputs, targets = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
    assert weigh(bound("cross_entropy")(outputs, targets), 4).weight == 4
    assert weigh(bound("mse")(outputs, targets), 4).weight == 4
    assert weigh(bound("torch.nn:BCEWithLogitsLoss")(outputs, targets), 4).weight == 4


def test_loss_returning_sum_and_weight():
    found = weigh((torch.tensor(6.0), torch.tensor(3)), 99)
    assert (found.total, found.weight, float(found.term), found.share) == (6.0, 3.0, 6.0, 1.0)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (as_number, "the loss is a float, not a tensor that can be differentiated"),
        (detached, "the loss depends on no trainable parameter"),
        (by_sample, "the loss has shape (6,); return a scalar"),
        (three, "the loss is a tuple of 3 items"),
        (negative, "the weight of a loss (sum, weight) is -1.0"),
        (Scaled, "has trainable parameters of its own (temperature)"),
        (Scaled(), "has trainable parameters of its own (temperature)"),
    ],
)
@pytest.mark.parametrize("strategy", ["all_reduce", "parameter_server"])
def test_invalid_losses_are_refused(tmp_path: Path, loss: Any, words: str, strategy: str):
    def body(comm):
        helpers.quiet_train(comm, helpers.make_job(tmp_path, loss=loss, strategy={"name": strategy}))

    with pytest.raises(HpctrainError) as raised:
        World(2).run(body)
    assert words in str(raised.value)


def test_loss_with_frozen_parameters_is_accepted():
    assert bound(Scaled(trained=False))(torch.randn(2, 3), torch.tensor([0, 1])).numel() == 1
    with pytest.raises(ModelError):
        bound(Scaled())
