"""A small convolutional network for small images, such as the 8 by 8 digits."""

from __future__ import annotations

from torch import nn

from hpctrain.errors import ModelError
from hpctrain.models.arguments import share, whole


def convnet(
    channels: int = 1,
    size: int = 8,
    outputs: int = 10,
    width: int = 32,
    hidden: int = 64,
    dropout: float = 0.0,
) -> nn.Module:
    """(n, channels, size, size) -> (n, outputs).

    Three 3 by 3 convolutions with `width`, 2 `width` and 2 `width` maps, halving the image after the second and the
    third, and one `hidden` layer. No batch norm, so that N workers compute the same as one worker with N times the
    batch (as long as `dropout` is 0).
    """
    if whole("size", size) % 4:
        raise ModelError(f"model.size = {size!r}: expected a multiple of 4, because the image is halved twice")
    width = whole("width", width)
    layers: list[nn.Module] = [
        nn.Conv2d(whole("channels", channels), width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, whole("hidden", hidden)),
        nn.ReLU(),
    ]
    if share("dropout", dropout) > 0:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(hidden, whole("outputs", outputs)))
