"""Exports a run's traces for other programs: a timeline for Perfetto and chrome://tracing, or tables (CSV, Parquet).

`export_run` writes them; `hpctrain trace export` is its command line. Importing this package does not load pandas,
h5py or pyarrow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from hpctrain.trace import Run
    from hpctrain.views.export.selection import Selection
    from hpctrain.views.progress import Progress

Export = Callable[["Run", "Selection", Path, "Progress"], None]

DEFAULT_OUTPUT = {"perfetto": "perfetto.json.gz", "csv": "csv", "parquet": "parquet"}
FORMATS = tuple(DEFAULT_OUTPUT)
LARGE_BYTES = {"": 2_000_000_000, ".gz": 200_000_000}  # about 10 million spans: a browser's tab has 4 GB


def export_run(
    run: Path | str,
    format: str,
    output: Path | str | None = None,
    ranks: Iterable[int] | None = None,
    steps: range | None = None,
    out: TextIO | None = None,
) -> Path:
    """Write the traces of a run folder in one of `FORMATS`; returns the path written.

    perfetto: one file in the Trace Event Format, compressed if its name ends in .gz. csv, parquet: a folder with a
    file per table (spans, steps, events, resources, metrics). `output`: that file or folder, by default in the run
    folder (`DEFAULT_OUTPUT`). `ranks`: only these. `steps`: only the time from the end of the step before the first of
    them to the end of the last, on any rank; all ranks are cut to this window. `out` (default stderr): receives notes
    on what is missing in the traces, and progress if the export takes more than two seconds.

    The output gets its name only when complete. Raises HpctrainError: no such run, format, rank or step; an output
    that cannot be written; Parquet without pyarrow.
    """
    write = _export(format)
    from hpctrain.trace import open_run
    from hpctrain.views.export.selection import select
    from hpctrain.views.progress import Progress

    opened = open_run(run)
    written, out = len(opened.notes), out or sys.stderr
    for note in opened.notes:
        print(f"note: {note}", file=out)
    selection = select(opened, ranks, steps)
    path = Path(output) if output is not None else opened.folder / DEFAULT_OUTPUT[format]
    with Progress(out) as progress:
        write(opened, selection, path, progress)
    for note in opened.notes[written:]:
        print(f"note: {note}", file=out)
    if path.is_file() and path.stat().st_size > LARGE_BYTES[".gz" if path.suffix == ".gz" else ""]:
        print("note: a browser may fail to open such a file; --ranks and --steps export a part of the run", file=out)
    return path


def _export(format: str) -> Export:
    if format == "perfetto":
        from hpctrain.views.export.perfetto import export_perfetto

        return export_perfetto
    if format == "csv":
        from hpctrain.views.export.tables import export_csv

        return export_csv
    if format == "parquet":
        from hpctrain.views.export.tables import export_parquet, find_pyarrow

        find_pyarrow()  # fail before the run is read
        return export_parquet
    raise HpctrainError(f"--format {format}: no such format; choose {', '.join(FORMATS)}")


def parse_ranks(text: str) -> list[int]:
    """ "0,3,8-15" -> [0, 3, 8, 9, ...]. Raises HpctrainError."""
    ranks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise HpctrainError(f"--ranks {text}: {part.strip()!r} is not a rank; write ranks such as 0,3 or 0-7")
        ranks.update(range(int(first), int(last or first) + 1))
    return sorted(ranks)


def parse_steps(text: str) -> range:
    """ "100:110" -> steps 100 to 110, both included; "100:" and ":110" are open, "100" is one step.

    Raises HpctrainError.
    """
    first, colon, last = (part.strip() for part in text.partition(":"))
    good = all(part.isdecimal() for part in (first, last) if part) and (first or last)
    start = int(first or 0) if good else 0
    stop = (int(last) if last else start if not colon else sys.maxsize - 1) if good else -1
    if stop < start:
        raise HpctrainError(f"--steps {text}: write the first step and the last, such as 100:110 (both are exported)")
    return range(start, stop + 1)
