"""Text as windows of characters: the model gets a window, and has to say the next character at each of its places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hpctrain.data.memory import Windows
from hpctrain.data.options import data_folder, whole
from hpctrain.data.splits import Splits
from hpctrain.errors import DataError

TEST_SHARE = 0.1  # the end of the text


def tinyshakespeare(path: str | None = None, context: int = 64, limit: int | None = None) -> Splits:
    """1,115,394 characters of Shakespeare (Karpathy's char-rnn), of 65 kinds, in windows of `context` characters that
    follow each other; the last tenth of the text is to test on. Inputs and targets are (context,) int64, the places of
    the characters among the sorted kinds; a target is the character that comes after.

    Searches for `input.txt` in the folder `path` and in `tinyshakespeare/` inside it; without `path`, in the folder set
    by HPCTRAIN_DATA, else in `data`. `limit`: use only the first `limit` training windows. Raises DataError if the file
    is missing or shorter than ten windows.
    """
    for key, value in (("context", context), ("limit", 1 if limit is None else limit)):
        whole(key, value)
    file = _find(data_folder(path))
    codes = _codes(file)
    border = round(len(codes) * (1 - TEST_SHARE))
    train, test = codes[:border], codes[border:]
    if len(test) <= context:
        raise DataError(
            f"{file} holds {len(codes)} characters, whose last tenth, to test on, has no window of data.context = "
            f"{context} and the next character; use a longer text or a shorter context"
        )
    if limit is not None:
        train = train[: limit * context + 1]
    return Splits(Windows(train, context), None, Windows(test, context))


def _codes(file: Path) -> torch.Tensor:
    """The characters of a text as their places among its sorted kinds, uint8."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    kinds, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    if len(kinds) == 0:
        raise DataError(f"{file} is empty; download it again")
    return torch.from_numpy(codes.astype(np.uint8))


def _find(folder: Path) -> Path:
    for place in (folder / "tinyshakespeare", folder):
        if (place / "input.txt").is_file():
            return place / "input.txt"
    raise DataError(
        f"no input.txt in {folder / 'tinyshakespeare'} or {folder}; put Karpathy's tinyshakespeare there, or set "
        "data.path, or HPCTRAIN_DATA to the folder that contains tinyshakespeare/"
    )
