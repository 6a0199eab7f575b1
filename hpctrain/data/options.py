"""Checks of the keyword arguments that data sets have in common, each with an error message of one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hpctrain.errors import DataError


def data_folder(path: Any) -> Path:
    """`path`, or the folder set by HPCTRAIN_DATA, else `data`. Raises DataError if it is no name."""
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise DataError(f"data.path = {path!r}: expected the name of a folder")
    return Path(path if path is not None else os.environ.get("HPCTRAIN_DATA") or "data")


def whole(key: str, value: Any) -> int:
    """`value` if it is an integer of at least 1; otherwise raises DataError naming data.`key`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"data.{key} = {value!r}: expected a whole number of at least 1")
    return value
