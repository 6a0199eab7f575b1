"""Files that bear their name only once they are complete."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import HpctrainError

COMPRESSION = 4  # of 9: a tenth larger than 9, five times as fast


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well. Raises HpctrainError if it cannot be written.

    What exists and is no file, a device or a pipe, is written to itself: it must not be replaced by a file.
    """
    beside = path.with_name(f".{path.name}.part")
    with _told(path):
        if path.is_dir():
            raise HpctrainError(f"{path}: this is a folder; give the name of a file with -o")
        if path.exists() and not path.is_file():
            yield path
            return
        try:
            yield beside
            os.replace(beside, path)
        finally:
            with suppress(OSError):
                beside.unlink()


@contextmanager
def output_text(path: Path) -> Iterator[TextIO]:
    """A text file to write; compressed if the name ends in .gz."""
    with output_file(path) as beside, open(beside, "wb") as raw:
        if path.suffix != ".gz":
            with io.TextIOWrapper(raw, encoding="utf-8", newline="") as text:
                yield text
            return
        with (
            gzip.GzipFile(path.stem, "wb", COMPRESSION, raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
        ):
            yield text


def make_folder(path: Path) -> None:
    """Raises HpctrainError if there is none and none can be made."""
    with _told(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise HpctrainError(f"{path}: cannot be written ({reason}); choose another place with -o") from None
