"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from hpctrain.errors import ModelError
from hpctrain.models.arguments import whole


def mlp(inputs: int, outputs: int = 10, hidden: Sequence[int] = (128,)) -> nn.Module:
    """Linear layers with ReLU between them: (n, ...) with `inputs` values each -> (n, outputs).

    `hidden`: the widths of the hidden layers; if empty, the model is linear.
    """
    if not isinstance(hidden, (list, tuple)):
        raise ModelError(f"model.hidden = {hidden!r}: expected a list of widths, such as [128, 64]")
    widths = [whole("inputs", inputs), *(whole(f"hidden[{i}]", w) for i, w in enumerate(hidden))]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], whole("outputs", outputs)))
