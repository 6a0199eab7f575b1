"""VGG16 (Simonyan and Zisserman 2015, configuration D), with the parameter names of torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpctrain.models.arguments import whole

STAGES = (1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)  # maps of each convolution, in multiples of `width`
SIDE = 7  # of the maps that the dense layers see


class VGG16(nn.Module):
    """(n, 3, height, width) -> (n, outputs); height and width at least 32, 224 as published."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        maps = 3
        for stage in STAGES:
            for factor in stage:
                layers += [nn.Conv2d(maps, factor * width, 3, padding=1), nn.ReLU(inplace=True)]
                maps = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(SIDE)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(maps * SIDE * SIDE, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, outputs),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        """The scores; see the class for shapes."""
        scores: Tensor = self.classifier[-1](self.penultimate(pictures))
        return scores

    def penultimate(self, pictures: Tensor) -> Tensor:
        """What the last layer sees: (n, 64 * width), 4096 as published."""
        seen: Tensor = self.classifier[:-1](torch.flatten(self.avgpool(self.features(pictures)), 1))
        return seen


def vgg16(outputs: int = 1000, width: int = 64) -> nn.Module:
    """(n, 3, height, width) -> (n, outputs); 138,357,544 parameters as published. `width`: maps of the first layer."""
    return VGG16(whole("outputs", outputs), whole("width", width))
