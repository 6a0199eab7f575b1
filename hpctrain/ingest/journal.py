"""What has been read so far, a line of JSON per item: an interrupted `hpctrain ingest` goes on from here."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hpctrain.errors import DataError
from hpctrain.ingest.reading import Reading, Row


class Journal:
    """A file of lines, the first of which says what is being made. `done`: items that it has, `kept`: those that were
    not left out. A context manager; one process at a time."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open the file, or create it. Raises DataError if another process writes it, or it is of another data set."""
        self.path, self.done, self.kept = path, 0, 0
        self._waiting: list[bytes] = []
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            self._lock()
            self._file.seek(0)
            head, mine = self._file.readline(), json.dumps({"fingerprint": fingerprint}).encode() + b"\n"
            if not head.endswith(b"\n"):
                self._file.truncate(0)
                self._file.write(mine)
                self._file.flush()
            elif head != mine:
                raise DataError(
                    f"{path} is of another data set, or of other options, that was not completed; remove it, or name "
                    "another output file"
                )
            else:
                self._resume(len(head))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.path}: another process is making this data set; wait for it") from None
        except OSError:  # a file system without locks
            pass

    def _resume(self, end: int) -> None:
        """Count the lines; an incomplete last one is removed."""
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.done += 1
            self.kept += json.loads(line)["row"] is not None
        self._file.truncate(end)

    def add(self, reading: Reading) -> None:
        """Append an item. It is not in the file before `sync`, which must follow that of its picture: after a loss of
        power the file must not name a picture that is lost."""
        line = {"name": reading.name, "row": reading.row, "problems": reading.problems}
        self._waiting.append(json.dumps(line).encode() + b"\n")
        self.done += 1
        self.kept += reading.row is not None

    def sync(self) -> None:
        """Write all lines, and wait until they are on the disk."""
        self._file.writelines(self._waiting)
        self._waiting.clear()
        self._file.flush()
        os.fsync(self._file.fileno())

    def rows(self) -> Iterator[tuple[str, Row | None, list[str]]]:
        """(name, row, problems) of every item, from the file."""
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                entry = json.loads(line)
                yield entry["name"], entry["row"], entry["problems"]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
