"""The command `hpctrain ingest`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpctrain.errors import DataError, HpctrainError
from hpctrain.ingest.captions import Captions
from hpctrain.ingest.folder import ClassFolders
from hpctrain.ingest.journal import Journal
from hpctrain.ingest.picture import FITS
from hpctrain.ingest.reading import Format, Listing, Reading, Recipe, batches
from hpctrain.ingest.store import About, PictureFile, complete, problems_of
from hpctrain.ingest.tasks import ordered
from hpctrain.ingest.voc import VOC
from hpctrain.ingest.workers import AHEAD, Rate, check_options, cores, local, on_ranks
from hpctrain.text import escaped, shown_path
from hpctrain.views.progress import Progress

FORMATS: dict[str, type[Format]] = {each.kind: each for each in (VOC, Captions, ClassFolders)}
SIZE, MOST_SIZE = 256, 8192
BATCH, TASK_BYTES = 16, 3 << 20  # pictures per task, and what they take at most, unless one takes more


@dataclass(frozen=True)
class Ingestion:
    """What a user asked for. `workers`: None: as many as there are cores; `fit`: a name in FITS."""

    kind: str
    source: Path
    out: Path
    workers: int | None = None
    size: int = SIZE
    fit: str = "pad"
    classes: Sequence[str] | None = None
    strict: bool = False

    def check(self) -> None:
        """Raise DataError for what cannot be done."""
        if not 1 <= self.size <= MOST_SIZE:
            raise DataError(f"--size {self.size}: expected a number of pixels from 1 to {MOST_SIZE}")
        if self.fit not in FITS:
            raise DataError(f"--fit {self.fit}: expected {' or '.join(FITS)}")
        if self.classes is not None and (not all(self.classes) or len(set(self.classes)) < len(self.classes)):
            raise DataError(f"--classes {','.join(self.classes)}: expected different names, with commas between them")
        if not self.source.is_dir():
            raise DataError(f"{self.source}: there is no such folder; name the folder of the data set")
        check_options(self.workers, self.out)


def main(request: Ingestion) -> int:
    """Make the file, on the ranks that a launcher started or on processes of this machine, and print what became of it.

    Collective over these ranks: rank 0 writes, the others read. Returns the exit status.
    """
    return on_ranks(request.workers, partial(_make, request))


def _make(request: Ingestion, executor: Executor | None = None, workers: int | None = None) -> int:
    """Make the file, with `workers` of that executor, or with processes of this machine."""
    request.check()
    recipe = Recipe(request.source.absolute(), FORMATS[request.kind](request.classes), request.size, request.fit)
    try:
        listing = recipe.format.listing(recipe.root)
        if not listing.items:
            raise DataError(f"{request.source} has no pictures where the format {request.kind!r} has them")
        if not _complete(request, recipe.fingerprint(listing)):
            count = workers or request.workers or cores()
            with contextlib.ExitStack() as stack:
                if executor is None:
                    tasks = -(-len(listing.items) // batch_size(request.size))
                    executor = stack.enter_context(local(min(count, tasks), "hpctrain.ingest.command"))
                ingest(recipe, listing, request.out, executor, count, request.strict)
    except BrokenProcessPool:
        raise HpctrainError(
            "a process that reads pictures was killed, perhaps as memory ran out; the same command goes on from there"
        ) from None
    except OSError as error:
        name = error.filename or request.out
        raise DataError(f"{name}: {error.strerror or error}; what has been read so far is kept") from None
    print("\n".join(map(escaped, summary(request.out))))
    return 0


def batch_size(size: int) -> int:
    """Pictures of size x size pixels per task."""
    return max(1, min(BATCH, TASK_BYTES // (3 * size * size)))


def _complete(request: Ingestion, fingerprint: str) -> bool:
    """Whether the output file is already what it should become. Raises DataError if it is something else."""
    if not request.out.exists():
        return False
    try:
        same = About.of(request.out).fingerprint == fingerprint
    except DataError:
        same = False
    if not same:
        raise DataError(
            f"{request.out} exists and is another data set, or made with other options; name another file, or remove it"
        )
    if request.strict:
        _refuse(problems_of(request.out))
    return True


def ingest(recipe: Recipe, listing: Listing, out: Path, executor: Executor, workers: int, strict: bool = False) -> None:
    """Read what is planned into the file `out`, which exists only once it is complete. Until then there are
    `out`.part and `out`.journal, from which another call goes on.

    Raises DataError if no picture can be read or, if `strict`, for the first problem; OSError for the output file.
    """
    part, notes = (out.with_name(f"{out.name}.{suffix}") for suffix in ("part", "journal"))
    fingerprint = recipe.fingerprint(listing)
    with Journal(notes, fingerprint) as journal:
        if strict:
            _refuse(listing.problems)
            for _, _, problems in journal.rows():
                _refuse(problems)
        if not part.exists() and journal.done:
            raise DataError(f"{part} is missing, but {notes} says how far it was; remove that as well, to begin again")
        with PictureFile(part, len(listing.items), recipe.size) as pictures, Progress() as progress:
            rate = Rate("ingest", journal.done, len(listing.items))
            tasks = batches(listing.items, journal.done, batch_size(recipe.size))
            for reading in _flat(ordered(executor, recipe.read, tasks, AHEAD * workers)):
                if strict:
                    _refuse(reading.problems)
                if reading.pixels is not None:
                    pictures.write(journal.kept, reading.pixels)
                journal.add(reading)
                if rate.due():
                    pictures.sync()
                    journal.sync()
                    progress(rate.text(journal.done))
            pictures.sync()
            journal.sync()
        if not journal.kept:
            first = next(iter([*listing.problems, *(text for _, _, texts in journal.rows() for text in texts)]))
            part.unlink()
            notes.unlink()
            raise DataError(f"no picture can be read; the first problem is: {first}")
        complete(part, listing, recipe, fingerprint, journal.rows)
        os.replace(part, out)
        notes.unlink()


def _flat(parts: Iterator[list[Reading]]) -> Iterator[Reading]:
    for part in parts:
        yield from part


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{problems[0]} (--strict)")


def summary(out: Path) -> list[str]:
    """What is in a file, and the problems that were found when it was made, as lines."""
    about, problems = About.of(out), problems_of(out)
    parts = [f"{about.samples:,} pictures of {about.size} x {about.size} pixels ({about.kind})"]
    if about.classes:
        counts = zip(about.classes, about.counts, strict=True)
        parts.append(f"{len(about.classes)} classes: " + ", ".join(f"{name} {count:,}" for name, count in counts))
    parts.append("splits: " + ", ".join(f"{name} {count:,}" for name, count in about.splits.items()))
    lines = [f"{shown_path(out)}: {'; '.join(parts)}"]
    if problems:
        lines += [f"{len(problems)} problem{'s' * (len(problems) > 1)}:", *(f"  {text}" for text in problems)]
    return lines
