"""The files a run writes into its folder while training. A full disk or a removed folder does not end the run."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from hpctrain.errors import CheckpointError
from hpctrain.filenames import BEST, BEST_ABOUT, EXAMPLES, JOB, METRICS, MODEL
from hpctrain.run.folder import Narrator, append_metrics

PAUSES = 0.0, 1.0, 3.0  # seconds before each attempt to write the model


class RunFiles:
    """Writes what it can. Reports a failure once, until writing works again, and at the end (`unwritten`).

    On rank 0 only.
    """

    def __init__(self, folder: Path, out: Narrator) -> None:
        self.folder, self._out = folder, out
        self._job = (folder / JOB).read_bytes() if (folder / JOB).is_file() else None
        self._failed: dict[str, str] = {}
        self._rows: list[Mapping[str, str]] = []  # all of this run; the first `_saved` are in the file
        self._saved = 0
        self._notes: list[str] = []

    def write(self, name: str, save: Callable[[], object], then: str) -> bool:
        """Call `save`, which raises CheckpointError or OSError if the file `name` cannot be written, and report a
        failure. True on success. `then`: what happens next, for the message."""
        try:
            self._recreate_if_removed()
            save()
        except (CheckpointError, OSError) as error:
            text = str(error) if isinstance(error, CheckpointError) else _sentence(self.folder / name, error)
            if name not in self._failed:
                self._out.say(f"warning: {text}; {then}")
            self._failed[name] = text
            return False
        if self._failed.pop(name, None) is not None:
            self._out.say(f"{self.folder / name} can be written again")
        return True

    def add_row(self, row: Mapping[str, str]) -> None:
        """Add a row to metrics.csv, after any that could not be written before."""
        self._rows.append(row)
        self.write_rows()

    def write_rows(self) -> None:
        """Write the rows that are not in the file yet."""
        if self._saved < len(self._rows):
            self.write(METRICS, self._append, "its rows are kept and written as soon as possible")

    def _append(self) -> None:
        append_metrics(self.folder, self._rows[self._saved :])
        self._saved = len(self._rows)

    def write_model(self, save: Callable[[Path], object]) -> None:
        """Call `save(folder)`, with retries; if all fail, save to a new temporary folder."""
        for pause in PAUSES:
            time.sleep(pause)
            if self.write(MODEL, lambda: save(self.folder), "trying again"):
                return
        with contextlib.suppress(OSError):
            place = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-"))
            try:
                save(place)
                self._notes.append(f"the model is in {place / MODEL}: move it to a safe place")
            except CheckpointError:
                place.rmdir()

    def write_best(self, save: Callable[[Path], object], about: Mapping[str, Any]) -> None:
        """Call `save(folder)`, then write `about` it. In between there is no such file, so that a crash cannot leave
        two files of different evaluations."""

        def both() -> None:
            (self.folder / BEST_ABOUT).unlink(missing_ok=True)
            save(self.folder)
            write_whole(self.folder / BEST_ABOUT, tomli_w.dumps(dict(about)))

        self.write(BEST, both, "training continues without it")

    def best(self) -> dict[str, Any]:
        """What is known of the best model in the folder; empty if there is none."""
        try:
            return tomllib.loads((self.folder / BEST_ABOUT).read_text())
        except (OSError, ValueError):
            return {}

    def write_examples(self, examples: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """Replace the examples by those of another evaluation, which may have none."""
        path = self.folder / EXAMPLES
        if examples:
            text = json.dumps({**about, "examples": examples})
            self.write(EXAMPLES, lambda: write_whole(path, text), "training continues without them")
        else:
            self.write(EXAMPLES, lambda: path.unlink(missing_ok=True), "it shows an earlier evaluation")

    def forget_examples(self, samples: int) -> None:
        """Remove the examples of an evaluation after `samples`, where a resumed run continues. Raises OSError."""
        path = self.folder / EXAMPLES
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            if json.loads(path.read_text())["samples"] > samples:
                path.unlink()

    def unwritten(self) -> str | None:
        """What the run folder lacks, and why; None if nothing is missing."""
        return "; ".join([*self._failed.values(), *self._notes]) or None

    def _recreate_if_removed(self) -> None:
        """Recreate the folder with its job file: a folder without one is not recognised as a run folder."""
        if self._job is None or (self.folder / JOB).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / JOB).write_bytes(self._job)
        self._saved = 0
        text = f"the run folder {self.folder} was removed during the run and has been recreated"
        self._out.say(f"warning: {text}; its contents are lost, and so are the traces")
        self._notes.append(f"{text}, without its earlier contents and without traces")


def write_whole(path: Path, text: str) -> None:
    """Write a file, all of it or nothing. Raises OSError."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _sentence(path: Path, error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror or error}); free space or fix permissions"
