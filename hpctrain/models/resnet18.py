"""ResNet-18 (He, Zhang, Ren, Sun 2016) for images of 32 by 32: a 3 by 3 stem and no max pooling."""

from __future__ import annotations

from torch import Tensor, nn

from hpctrain.models.arguments import whole


class BasicBlock(nn.Module):
    """Two 3 by 3 convolutions with a shortcut: (n, inputs, h, w) -> (n, outputs, h/stride, w/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_normed(inputs, outputs, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*_normed(outputs, outputs, 3, 1))
        self.past: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.past = nn.Sequential(*_normed(inputs, outputs, 1, stride))

    def forward(self, images: Tensor) -> Tensor:
        """The block's output; see the class for shapes."""
        summed: Tensor = self.second(self.first(images)) + self.past(images)
        return summed.relu()


def resnet18(channels: int = 3, outputs: int = 10, width: int = 64) -> nn.Module:
    """(n, channels, 32, 32) -> (n, outputs); 11,173,962 parameters with the defaults.

    `width`: maps of the first of the four stages, which are 1, 2, 4 and 8 times as wide.
    """
    width = whole("width", width)
    stem = [*_normed(whole("channels", channels), width, 3, 1), nn.ReLU()]
    blocks: list[nn.Module] = []
    before = width
    for stage in range(4):
        after = width << stage
        blocks += [BasicBlock(before, after, 1 if stage == 0 else 2), BasicBlock(after, after, 1)]
        before = after
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, whole("outputs", outputs))]
    return nn.Sequential(*stem, *blocks, *head)


def _normed(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outputs)]
