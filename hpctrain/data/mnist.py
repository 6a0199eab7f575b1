"""MNIST, and data sets in the same four idx files (Fashion-MNIST, KMNIST): 28 by 28 pixels, 10 classes."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.memory import Images
from hpctrain.data.options import data_folder, whole
from hpctrain.data.splits import Splits
from hpctrain.errors import DataError

MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, pixels from 0 to 1
_CHUNK = 1 << 20


def mnist(path: str | None = None, limit: int | None = None) -> Splits:
    """60,000 training and 10,000 test images, (1, 28, 28) float32 with mean 0 and standard deviation 1; int64 classes.

    Searches for the idx files, plain or .gz, in the folder `path` and in `mnist/` inside it; without `path`, in the
    folder set by HPCTRAIN_DATA, else in `data`. `limit`: use only the first `limit` training images. Raises DataError
    for files that are missing or corrupt.
    """
    folder, first = data_folder(path), whole("limit", limit) if limit is not None else None
    return Splits(_part(folder, "train", first), None, _part(folder, "t10k", None))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file of bytes, plain or .gz. Raises DataError if the file is incomplete."""
    opener = cast(Callable[[Path], IO[bytes]], gzip.open if path.suffix == ".gz" else _plain)
    try:
        with opener(path) as file:
            return _parse(file, path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _part(folder: Path, part: str, limit: int | None) -> Images:
    images_path, labels_path = (_find(folder, f"{part}-{kind}") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds an array of shape {images.shape}; expected (images, 28, 28)")
    if labels.ndim != 1:
        raise DataError(f"{labels_path} holds an array of shape {labels.shape}; expected one label per image")
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images, but {labels_path.name} {len(labels)} labels; "
            "download both from the same place"
        )
    if len(labels) == 0 or labels.max() > 9:
        found = "no images" if len(labels) == 0 else f"the label {labels.max()}"
        raise DataError(f"{labels_path} holds {found}; expected labels from 0 to 9")
    pixels = torch.from_numpy(images[:limit]).unsqueeze(1)
    return Images(pixels, torch.from_numpy(labels[:limit].astype(np.int64)), MEAN, STD)


def _find(folder: Path, stem: str) -> Path:
    """The file `stem`-ubyte in `folder` or its mnist/, with or without .gz; the name may contain a dot, as some
    distributors write it."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(
            f"the MNIST folder {folder} {what}; set data.path, or HPCTRAIN_DATA to the folder that contains mnist/"
        )
    names = [f"{name}-ubyte{end}" for name in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz")]
    places = [folder / "mnist", folder]
    for place in places:
        for name in names:
            if (place / name).is_file():
                return place / name
    raise DataError(
        f"no MNIST file {names[0]} (or {', '.join(names[1:])}) in {places[0]} or {places[1]}; put it there, "
        "or set data.path, or HPCTRAIN_DATA to the folder that contains mnist/"
    )


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _parse(file: IO[Any], path: Path) -> NDArray[np.uint8]:
    magic = file.read(4)
    dimensions = magic[3] if len(magic) == 4 else 0
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4:
        raise DataError(
            f"{path} is not an idx file of bytes: it begins with {magic.hex() or 'nothing'}, where 00000803 "
            "(images) or 00000801 (labels) was expected; download it again"
        )
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path} is truncated: it ends within its header; download it again")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4))
    expected = int(np.prod(shape, dtype=object))
    data = bytearray()
    while len(data) <= expected and (chunk := file.read(_CHUNK)):  # the header alone is not trusted
        data += chunk
    if len(data) != expected:
        what = f"is truncated: it holds {len(data)} bytes of data" if len(data) < expected else "is too long"
        raise DataError(f"{path} {what}; its header says {expected} bytes {shape}; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
