"""scikit-learn's handwritten digits: 1,797 images of 8 by 8 pixels, included in the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from hpctrain.data.splits import Splits, stratified
from hpctrain.errors import DataError

TEST_IMAGES = 360


def digits() -> Splits:
    """1,437 training and 360 test images, (1, 8, 8) float32 from 0 to 1, with int64 classes 0 to 9.

    The test part is a stratified fifth; it is the same in every run, whatever the seed.
    """
    pixels, targets = _read()
    test = stratified(targets, TEST_IMAGES, 0)
    images = torch.from_numpy((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    classes = torch.from_numpy(targets)
    return Splits(TensorDataset(images[~test], classes[~test]), None, TensorDataset(images[test], classes[test]))


def _read() -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(n, 64) pixels from 0 to 16, and (n,) classes; read directly from the package's file if it is at its usual path.

    Importing scikit-learn takes longer than anything else when a rank starts, and only this file is needed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError('data.name = "digits": scikit-learn, which brings these images, is missing; install it')
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.data, loaded.target.astype(np.int64)
