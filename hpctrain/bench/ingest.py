"""Bench of `hpctrain ingest`: copies of BCCD by one process, by processes, and by a plain ProcessPoolExecutor.map.

Each way runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpctrain.bench.comparison import Goal, ratio
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.data.options import data_folder
from hpctrain.errors import DataError

COPIES, FEW = 10, 2
WORKERS, REPETITIONS = 2, 3
SECONDS, PEAK = "seconds", "peak, MiB"
ONE, QUEUE, MAP, SMALL = "one process", "task queue", "plain map", "task queue, a fifth"
# From the start of the pool to a complete file. The plain map has no journal: it reads all over again after a crash.
PROGRAM = """
import json, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hpctrain.ingest import command
from hpctrain.ingest.reading import Recipe, batches
from hpctrain.ingest.store import PictureFile, complete
from hpctrain.ingest.tasks import Inline, processes
from hpctrain.ingest.voc import VOC

way, source, out, workers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
recipe = Recipe(source, VOC(), command.SIZE, "pad")
listing = recipe.format.listing(source)
began = time.perf_counter()
if way == "one process":
    command.ingest(recipe, listing, out, Inline(), 1)
elif way == "plain map":
    rows, slot = [], 0
    parts = list(batches(listing.items, 0, command.batch_size(recipe.size)))
    with (
        ProcessPoolExecutor(workers, get_context("forkserver")) as executor,
        PictureFile(out, len(listing.items), recipe.size) as pictures,
    ):
        for part in executor.map(recipe.read, parts):
            for reading in part:
                if reading.pixels is not None:
                    pictures.write(slot, reading.pixels)
                    slot += 1
                rows.append((reading.name, reading.row, reading.problems))
        pictures.sync()
    complete(out, listing, recipe, "", lambda: iter(rows))
else:
    with processes(workers, "hpctrain.ingest.command") as executor:
        command.ingest(recipe, listing, out, executor, workers)
seconds = time.perf_counter() - began
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""


def measure_ingest(progress: Callable[[str], None]) -> FigureTable:
    """Seconds, and peak memory of the process that writes. Raises DataError if there is no BCCD."""
    source = data_folder(None) / "bccd_voc" / "BCCD"
    if not (source / "ImageSets" / "Main").is_dir():
        raise DataError(f"hpctrain bench ingest: there is no {source}; set HPCTRAIN_DATA to the folder of bccd_voc")
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in (ONE, QUEUE, MAP, SMALL)}
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as name:
        large, small = (_copies(source, Path(name) / f"{copies}", copies) for copies in (COPIES, FEW))
        for repetition in range(REPETITIONS):
            progress(f"ingest, {repetition + 1} of {REPETITIONS}")
            for way, runs in taken.items():
                runs.append(_run(way, small if way == SMALL else large, Path(name) / "out.h5"))
    pictures = len(list((source / "JPEGImages").iterdir()))
    table = FigureTable(
        "ingest",
        f"ingest: {COPIES} copies of BCCD, {COPIES * pictures:,} pictures; {WORKERS} processes read, one writes",
        [SECONDS, PEAK],
    )
    for way, runs in taken.items():
        seconds, peaks = zip(*runs, strict=True)
        table.rows[way] = {SECONDS: Sample(seconds, "s"), PEAK: Sample(peaks, "MiB")}
    for what, column, mine, other, goal in (
        (f"{ONE} / {QUEUE}", SECONDS, ONE, QUEUE, Goal(1.6, at_least=True)),
        (f"{QUEUE} / {MAP}", SECONDS, QUEUE, MAP, Goal(1.05)),
        (f"{QUEUE} / {SMALL}", PEAK, QUEUE, SMALL, Goal(1.05)),
    ):
        table.comparisons.append(ratio(what, column, table.rows[mine][column], table.rows[other][column], goal))
    return table


def _copies(source: Path, folder: Path, copies: int) -> Path:
    """A data set of links to the files of `source`, each under several names."""
    names = (source / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    names += (source / "ImageSets" / "Main" / "test.txt").read_text().split()
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (folder / kind).mkdir(parents=True)
        for name in names:
            for copy in range(copies):
                (folder / kind / f"{name}_{copy}.{suffix}").symlink_to((source / kind / f"{name}.{suffix}").absolute())
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    listed = [f"{name}_{copy}\n" for copy in range(copies) for name in names]
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(listed))
    return folder


def _run(way: str, source: Path, out: Path) -> tuple[float, float]:
    """(seconds, MiB)."""
    program = out.with_name("program.py")
    program.write_text(f"if __name__ == '__main__':\n{_indented(PROGRAM)}")
    words = [sys.executable, str(program), way, str(source), str(out), str(WORKERS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} ended with status {done.returncode}:\n{done.stderr}")
    out.unlink()
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
