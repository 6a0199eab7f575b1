"""Files that get their final name only once they are complete."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import HpctrainError

COMPRESSION = 4  # gzip level: files a tenth larger than with level 9, five times as fast


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` if the block succeeds. Raises HpctrainError if it cannot be written.

    An existing device or pipe is written to directly: a file must not replace it.
    """
    beside = path.with_name(f".{path.name}.part")
    with _naming(path):
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
    """Open a text file for writing, as `output_file` does; compressed if the name ends in .gz."""
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
    """Create the folder if it does not exist. Raises HpctrainError if that fails."""
    with _naming(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise HpctrainError(f"{path}: cannot be written ({reason}); choose another place with -o") from None
