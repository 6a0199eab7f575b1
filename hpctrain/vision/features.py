"""The command `hpctrain features`: what a net sees in each picture of a captions file, computed once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.errors import DataError, HpctrainError
from hpctrain.ingest.store import About, opened
from hpctrain.ingest.tasks import ordered
from hpctrain.ingest.workers import AHEAD, Rate, check_options, cores, local, on_ranks
from hpctrain.text import escaped, shown_path
from hpctrain.views.progress import Progress
from hpctrain.vision.backbones import SIZE, Backbone, backbone, digest
from hpctrain.vision.featurefile import FORMAT, FeatureAbout, FeatureWriter, readable

BATCH = 8  # pictures per task: always as many, since the last bits depend on it


@dataclass(frozen=True)
class Extraction:
    """What a user asked for. `workers`: None: as many as there are cores."""

    captions: Path
    out: Path
    backbone: str
    weights: Path | None = None
    workers: int | None = None

    def check(self) -> About:
        """What the file of pictures says. Raises DataError for what cannot be done."""
        check_options(self.workers, self.out)
        about, where = About.of(self.captions), shown_path(self.captions)
        if about.kind != "captions":
            raise DataError(f"{where} was made by `hpctrain ingest {about.kind}`; expected `hpctrain ingest captions`")
        if about.size != SIZE:
            raise DataError(
                f"{where} has pictures of {about.size} x {about.size} pixels; {self.backbone} takes {SIZE} x {SIZE}: "
                f"make it with `hpctrain ingest captions SRC OUT.h5 --size {SIZE}`"
            )
        return about


@dataclass(frozen=True)
class Seeing:
    """Computes features in any process: it can be pickled. `digest`: of the weights; another file is another net."""

    backbone: str
    weights: Path
    digest: str

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, width) of pictures (n, height, width, 3), by one thread, so that the bits are the same."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
                found: NDArray[np.float32] = _loaded(self).features(pictures).numpy()
                return found
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class FromFile:
    """The task of a worker: pictures of that file."""

    pictures: Path
    seeing: Seeing

    def __call__(self, first: int) -> NDArray[np.float32]:
        """Of the pictures from number `first` on. Raises DataError if they cannot be read."""
        with readable(self.pictures), opened(self.pictures) as file:
            pixels = file["pictures"][first : first + BATCH]
        return self.seeing.of(pixels)


@lru_cache(maxsize=1)
def _loaded(seeing: Seeing) -> Backbone:
    return backbone(seeing.backbone)(seeing.weights)


def seeing(name: str, weights: Path | None) -> Seeing:
    """That net, with the weights in that file, or in the package that has them. Raises HpctrainErrors if it or they
    cannot be loaded."""
    path = backbone(name).weights(weights).absolute()
    found = Seeing(name, path, digest(path))
    _loaded(found)
    return found


def main(request: Extraction) -> int:
    """Make the file, on the ranks that a launcher started or on processes of this machine, and print what became of it.

    Collective over these ranks: rank 0 writes, the others compute. Returns the exit status.
    """
    return on_ranks(request.workers, partial(_make, request))


def _make(request: Extraction, executor: Executor | None = None, workers: int | None = None) -> int:
    source = request.check()
    net = seeing(request.backbone, request.weights)
    about = _about(request, source, net)
    try:
        if not _complete(request.out, about):
            tasks = -(-about.samples // BATCH)
            count = min(workers or request.workers or cores(), tasks)
            with contextlib.ExitStack() as stack:
                if executor is None:
                    executor = stack.enter_context(local(count, "hpctrain.vision.features"))
                extract(request, about, net, executor, count)
    except BrokenProcessPool:
        raise HpctrainError(
            "a process that computes features was killed, perhaps as memory ran out; start fewer with -n"
        ) from None
    except OSError as error:
        raise HpctrainError(f"the features cannot be computed: {error}") from None
    splits = ", ".join(f"{name} {count:,}" for name, count in about.splits.items())
    print(escaped(
        f"{shown_path(request.out)}: {about.samples:,} pictures, {about.width:,} features each ({about.backbone}); "
        f"splits: {splits}"
    ))  # fmt: skip
    return 0


def _about(request: Extraction, source: About, net: Seeing) -> FeatureAbout:
    made = [FORMAT, source.fingerprint, net.backbone, net.digest]
    return FeatureAbout(
        FORMAT, os.path.relpath(request.captions, request.out.parent), source.fingerprint, net.backbone, net.digest,
        source.size, source.fit, backbone(net.backbone).width, source.samples, source.splits,
        hashlib.sha256(json.dumps(made).encode()).hexdigest(),
    )  # fmt: skip


def _complete(out: Path, about: FeatureAbout) -> bool:
    """Whether the output file is already what it should become. Raises DataError if it is something else."""
    if not out.exists():
        return False
    try:
        same = FeatureAbout.of(out).fingerprint == about.fingerprint
    except DataError:
        same = False
    if not same:
        raise DataError(
            f"{shown_path(out)} exists and is something else, or was made of other pictures or with another net; name "
            "another file, or remove it"
        )
    return True


def extract(request: Extraction, about: FeatureAbout, net: Seeing, executor: Executor, workers: int) -> None:
    """Compute all features into the output file, which exists only once it is complete."""
    part = request.out.with_name(f"{request.out.name}.part")
    try:
        with _writing(request.out):
            with FeatureWriter(part, about, request.captions) as file, Progress() as progress:
                rate, task = Rate("features", 0, about.samples), FromFile(request.captions.absolute(), net)
                for place, found in _placed(ordered(executor, task, range(0, about.samples, BATCH), AHEAD * workers)):
                    file.write(place, found)
                    if rate.due():
                        progress(rate.text(place + len(found)))
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            os.replace(part, request.out)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of the block are those of the output file, but not in HDF5's words, which fill lines."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{shown_path(out)}: cannot be written ({reason}); choose another place for it") from None


def _placed(parts: Iterator[NDArray[np.float32]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    place = 0
    for part in parts:
        yield place, part
        place += len(part)
