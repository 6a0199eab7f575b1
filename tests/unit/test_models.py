"""Models by name: sizes, shapes, and messages for wrong keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpctrain.errors import ModelError
from hpctrain.models.convnet import convnet
from hpctrain.models.lenet5 import lenet5
from hpctrain.models.mlp import mlp
from hpctrain.models.resnet18 import resnet18

CASES: list[tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...], int, int]] = [
    (lenet5, {}, (1, 28, 28), 10, 61_706),
    (lenet5, {"outputs": 26}, (1, 28, 28), 26, 61_706 + 16 * 85),
    (mlp, {"inputs": 64}, (1, 8, 8), 10, 65 * 128 + 129 * 10),
    (mlp, {"inputs": 20, "outputs": 3, "hidden": [7, 5]}, (20,), 3, 21 * 7 + 8 * 5 + 6 * 3),
    (mlp, {"inputs": 20, "outputs": 3, "hidden": []}, (20,), 3, 21 * 3),
    (convnet, {}, (1, 8, 8), 10, 72_842),
    (convnet, {"channels": 3, "size": 12, "outputs": 4, "width": 4, "dropout": 0.5}, (3, 12, 12), 4, 5_924),
    (resnet18, {}, (3, 32, 32), 10, 11_173_962),
    (resnet18, {"channels": 1, "outputs": 7, "width": 4}, (1, 32, 32), 7, 44_451),
]


@pytest.mark.parametrize(("model", "options", "inputs", "outputs", "parameters"), CASES)
def test_shapes_and_sizes(
    model: Callable[..., nn.Module],
    options: dict[str, Any],
    inputs: tuple[int, ...],
    outputs: int,
    parameters: int,
) -> None:
    net = model(**options)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.rand(2, *inputs)).shape == (2, outputs)


def test_resnet18_halves_its_maps_three_times() -> None:
    net = resnet18(width=4)
    assert isinstance(net, nn.Sequential)
    assert net[:-3](torch.rand(2, 3, 32, 32)).shape == (2, 32, 4, 4)


def test_same_seed_gives_the_same_model() -> None:
    for model in (lenet5, convnet):
        torch.manual_seed(3)
        one = model()
        torch.manual_seed(3)
        for a, b in zip(one.parameters(), model().parameters(), strict=True):
            assert torch.equal(a, b)


WRONG: list[tuple[Callable[..., nn.Module], dict[str, Any], str]] = [
    (lenet5, {"outputs": 0}, "model.outputs = 0: expected a whole number of at least 1"),
    (lenet5, {"outputs": "ten"}, "model.outputs = 'ten'"),
    (lenet5, {"outputs": True}, "model.outputs = True"),
    (mlp, {"inputs": -1}, "model.inputs = -1"),
    (mlp, {"inputs": 4, "hidden": 8}, "model.hidden = 8: expected a list of widths"),
    (mlp, {"inputs": 4, "hidden": "88"}, "model.hidden = '88': expected a list of widths"),
    (mlp, {"inputs": 4, "hidden": [8, 2.5]}, r"model.hidden\[1\] = 2.5"),
    (convnet, {"size": 10}, "model.size = 10: expected a multiple of 4"),
    (convnet, {"dropout": 1.0}, "model.dropout = 1.0: expected a number from 0 to below 1"),
    (convnet, {"dropout": float("nan")}, "model.dropout = nan"),
    (convnet, {"width": 1.5}, "model.width = 1.5"),
    (resnet18, {"channels": 0}, "model.channels = 0"),
    (resnet18, {"width": None}, "model.width = None"),
]


@pytest.mark.parametrize(("model", "options", "message"), WRONG)
def test_wrong_arguments_are_refused(model: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model(**options)
