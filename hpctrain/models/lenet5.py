"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998)."""

from __future__ import annotations

from torch import nn

from hpctrain.models.arguments import whole


def lenet5(outputs: int = 10) -> nn.Module:
    """(n, 1, 28, 28), padded to 32 by 32 internally -> (n, outputs); 61,706 parameters for 10 outputs.

    With ReLU and max pooling, as is usual today, and with every map of the second convolution connected to all of the
    first.
    """
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, whole("outputs", outputs)),
    )
