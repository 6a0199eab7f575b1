"""Reads a run's traces into pandas frames, with times corrected to rank 0's clock.

Anything that cannot be read is left out and noted in `Run.notes`; if nothing can be read, a TraceError is raised.
Files are opened only for the duration of a call, through SWMR and without locks, so that a run in progress is not
disturbed.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.errors import HpctrainError, TraceError
from hpctrain.filenames import JOB, METRICS
from hpctrain.job.file import LONGEST
from hpctrain.text import escaped, shown
from hpctrain.trace.files import (
    Rows,
    TraceFile,
    UnreadableTrace,
    align,
    event_of,
    open_file,
    open_h5,
    read_regular,
    read_rows,
    strays,
)
from hpctrain.trace.schema import KIND_CODES, KINDS, OUTCOMES, TABLES
from hpctrain.trace.soundness import TIMES
from hpctrain.trace.versions import READER_NOTES
from hpctrain.trace.writer import trace_files

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.job import Job

Ranks = int | Iterable[int] | None
Keep = Callable[[Rows], Rows]
LONGEST_METRICS = 1 << 26  # bytes of metrics.csv: a million evaluations
BLOCK_ROWS = 1 << 16  # 3 MB of spans: fits in the CPU caches


def open_run(path: Path | str) -> Run:
    """Open the run in the folder `path`, or the run that the file `path` belongs to. Raises TraceError."""
    return Run(path)


class Run:
    """A run's traces.

    Attributes: `folder`; `ranks`: the ranks with a readable file; `size`: the number of ranks in the run;
    `attempts`: their numbers, 1 and one more for every resumption; `notes`: what is missing or damaged (grows as more
    is read).

    Frames have columns `rank` and `attempt`. Times are given as `..._ns` on rank 0's clock and as seconds (`..._s`)
    since the run's first span. `rank` selects one rank or several; the rows of other ranks' files are then not read.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = run_folder(Path(path))
        self.notes: list[str] = []
        self._files = self._open_files()
        self.ranks = sorted({file.rank for file in self._files})
        self.attempts = sorted({file.attempt for file in self._files})
        self.size = max(size_of(files) for files in self._by_attempt().values())
        self._note_gaps()
        align(self._files)

    # -- opening -----------------------------------------------------------------------------------------
    def _open_files(self) -> list[TraceFile]:
        files = []
        faults: dict[tuple[int, str], dict[int, UnreadableTrace]] = {}
        for (attempt, rank), path in trace_files(self.folder).items():
            try:
                files.append(open_file(path, rank, attempt))
            except UnreadableTrace as error:
                faults.setdefault((attempt, error.reason), {})[rank] = error
        for file in strays(files):
            files.remove(file)
            stray = UnreadableTrace(file.path, file.rank, "is dated years from the others: its clocks are damaged")
            faults.setdefault((file.attempt, stray.reason), {})[file.rank] = stray
        texts = [_fault_text(attempt, reason, errors) for (attempt, reason), errors in faults.items()]
        if not files:
            if texts:
                raise TraceError(f"{self.folder}: none of its traces can be read: {'; '.join(texts[:3])}")
            raise TraceError(f"{self.folder}: this run has no traces (was it started with trace.enabled = false?)")
        self.notes += map(escaped, texts)
        return files

    def _by_attempt(self) -> dict[int, list[TraceFile]]:
        return {number: [file for file in self._files if file.attempt == number] for number in self.attempts}

    def _note_gaps(self) -> None:
        if self.simulated:
            self._note(f"simulated, not measured: {self.simulated}")
        for version in sorted({int(file.attributes["schema_version"]) for file in self._files} & set(READER_NOTES)):
            ranks = sorted({file.rank for file in self._files if file.attributes["schema_version"] == version})
            self._note(f"{name_ranks(ranks)}: written in schema version {version}: {READER_NOTES[version]}")
        present = trace_files(self.folder)
        for attempt, files in self._by_attempt().items():
            size = size_of(files)
            which = f" in attempt {attempt}" if len(self.attempts) > 1 else ""
            missing = [rank for rank in range(size) if (attempt, rank) not in present]
            if missing:
                self._note(f"{name_ranks(missing)} of {size}: no trace file{which}")
            unclosed = [file.rank for file in files if not file.closed]
            if unclosed:
                self._note(
                    f"{name_ranks(unclosed)} of {size}: trace not closed{which}: still running, or killed; "
                    "complete up to the last flush"
                )
        for file in self._files:
            if file.faults:
                names = ", ".join(file.faults[:8])
                self._note(f"rank {file.rank}: trace/{file.path.name} is damaged: invalid {names}")
            for name, claimed in file.claimed.items():
                if claimed < 0:
                    self._note(f"rank {file.rank}: /{name} of trace/{file.path.name} cannot be read")
                elif file.rows[name] < claimed:
                    self._note_lost(file, name, claimed - file.rows[name], claimed)

    def _note(self, text: str) -> None:
        text = escaped(text)
        if text not in self.notes:
            self.notes.append(text)

    def _note_lost(self, file: TraceFile, table: str, lost: int, whole: int) -> None:
        where = f"rows of /{table} of trace/{file.path.name}"
        text = f"rank {file.rank}: {lost} of {whole} {where} cannot be read: the file is damaged or truncated"
        known = next((i for i, note in enumerate(self.notes) if f" {where} " in note), None)
        if known is None:
            self._note(text)
        else:
            self.notes[known] = text  # more of the table has been read since

    # -- about the run -----------------------------------------------------------------------------------
    @property
    def simulated(self) -> str:
        """The cluster that the run was simulated on, in words; "" if it was a real run."""
        return next((file.simulated for file in self._files if file.simulated), "")

    @cached_property
    def job(self) -> Job | str:
        """The resolved job, without importing anything it names; its text if it is not a valid job; "" if missing."""
        from hpctrain.job import Job

        path = self.folder / JOB
        try:
            return Job.recorded(path) if path.is_file() else self.job_text
        except HpctrainError:
            return self.job_text

    @cached_property
    def job_text(self) -> str:
        """The content of job.toml, valid or not; if there is no such file, the copy in the traces."""
        try:
            return read_regular(self.folder / JOB, LONGEST).decode(errors="replace")
        except OSError:
            return str(self._files[0].attributes.get("job", ""))

    def attributes(self, rank: int, attempt: int | None = None) -> dict[str, Any]:
        """The attributes of the rank's file: rank, size, host, node, role, device, job, versions ...

        `attempt` defaults to the rank's newest. Raises TraceError if there is no such file.
        """
        for file in reversed(self._files):
            if file.rank == rank and attempt in (None, file.attempt):
                return dict(file.attributes)
        which = f" in attempt {attempt}" if attempt is not None else ""
        known = name_ranks(self.ranks)
        raise TraceError(f"{self.folder}: no readable trace of rank {rank}{which}; choose from {known}")

    @cached_property
    def start_ns(self) -> int:
        """Start of the run's first span on rank 0's clock, found among the first 4096 spans of each file."""
        starts = []
        for table, column in (("spans", "start_ns"), ("steps", "t_ns"), ("events", "t_ns")):
            for file in self._files:
                block = next(self._blocks(file, table, 4096, [column]), None)
                if block is not None:
                    starts.append(int(block[column].min()))
            if starts:
                break
        return min(starts, default=0)

    # -- rows --------------------------------------------------------------------------------------------
    def blocks(
        self,
        table: str,
        rank: Ranks = None,
        rows: int = BLOCK_ROWS,
        columns: Iterable[str] | None = None,
    ) -> Iterator[tuple[int, int, Rows]]:
        """Yield (rank, attempt, rows) of one of `schema.TABLES`, at most `rows` at a time, in the order written.

        Times are corrected. Use this for tables too large for a frame. `columns`: only these; cheaper without times.
        """
        names = None if columns is None else list(columns)
        for file in self._select(rank):
            for block in self._blocks(file, table, rows, names):
                yield file.rank, file.attempt, block

    def rows(self, table: str) -> dict[tuple[int, int], int]:
        """The number of rows in one of `schema.TABLES`, by (rank, attempt)."""
        return {(file.rank, file.attempt): file.rows[table] for file in self._files}

    def _select(self, rank: Ranks) -> list[TraceFile]:
        if rank is None:
            return self._files
        wanted = {rank} if isinstance(rank, int) else set(rank)
        absent = sorted(wanted - set(self.ranks))
        if absent:
            known = name_ranks(self.ranks)
            raise TraceError(f"{self.folder}: no readable trace of {name_ranks(absent)}; choose from {known}")
        return [file for file in self._files if file.rank in wanted]

    def _blocks(
        self,
        file: TraceFile,
        table: str,
        rows: int,
        columns: list[str] | None = None,
        keep: Keep | None = None,
    ) -> Iterator[Rows]:
        """`keep` gets complete rows with the rank's own times, before columns are selected and times corrected."""
        whole = file.rows[table]
        lost = 0
        with open_h5(file.path) as h5:
            for start in range(0, whole, rows):
                stop = min(start + rows, whole)
                block = file.sound(table, read_rows(h5[table], start, stop), self.size)
                lost += stop - start - len(block)
                block = keep(block) if keep else block
                if len(block):
                    # Complete rows are read anyway: HDF5 takes twice as long to read selected fields.
                    block = block if columns is None else block[columns]
                    for name in set(TIMES) & set(block.dtype.names or ()):
                        block[name] = file.correct(block[name])
                    yield block
        if lost:
            self._note_lost(file, table, lost + file.claimed[table] - whole, file.claimed[table])

    # -- frames ------------------------------------------------------------------------------------------
    def spans(
        self,
        rank: Ranks = None,
        kind: str | Iterable[str] | None = None,
        steps: range | tuple[int, int] | None = None,
        columns: Iterable[str] | None = None,
    ) -> pd.DataFrame:
        """Columns rank, attempt, step, kind, lane, piece, start_ns, end_ns, bytes, peer, id, items, flops, start_s,
        end_s.

        `kind`: one or several of `schema.KINDS`; `steps`: (first, one past the last), or a range. `columns`: only
        these of `schema.SPANS`, plus rank and attempt, for a smaller frame; each `..._ns` also adds its `..._s`.
        """
        codes = None
        if kind is not None:
            codes = [KIND_CODES[name] for name in ([kind] if isinstance(kind, str) else kind)]
        first, last = (steps.start, steps.stop) if isinstance(steps, range) else steps or (0, 0)

        def keep(block: Rows) -> Rows:
            if codes is not None:
                block = block[np.isin(block["kind"], codes)]
            if steps is not None:
                block = block[(block["step"] >= first) & (block["step"] < last)]
            return block

        frame = self._frame("spans", rank, keep, columns)
        if "kind" in frame:
            frame["kind"] = _categories(frame["kind"].to_numpy(), KINDS)
        return frame

    def steps(self, rank: Ranks = None, rolled_back: bool = False) -> pd.DataFrame:
        """Columns rank, attempt, step, epoch, loss, samples, lr, outcome, staleness_min, staleness_max,
        phase, cursor, t_ns, t_s: see `schema.STEPS`. Steps that a resumed run repeated are left out unless
        `rolled_back` is set.
        """
        frame = self._frame("steps", rank)
        frame["outcome"] = _categories(frame["outcome"].to_numpy(), OUTCOMES)
        if not rolled_back and len(self.attempts) > 1:
            frame = frame[self._valid(frame)].reset_index(drop=True)
        return frame

    def _valid(self, frame: pd.DataFrame) -> Rows:
        """Mask of the steps that no later attempt repeated."""
        first = {key: int(steps.min()) for key, steps in frame[frame["step"] >= 0].groupby(["rank", "attempt"])["step"]}
        valid = np.ones(len(frame), bool)
        step, rank, attempt = (frame[name].to_numpy() for name in ("step", "rank", "attempt"))
        for (of_rank, again), start in first.items():
            valid &= ~((rank == of_rank) & (attempt < again) & (step >= start))
        return valid

    def resources(self, rank: Ranks = None) -> pd.DataFrame:
        """Columns rank, attempt, the columns of `schema.RESOURCES`, t_s."""
        return self._frame("resources", rank)

    def events(self, rank: Ranks = None) -> pd.DataFrame:
        """Columns rank, attempt, t_ns, kind, text, event, t_s, sorted by time.

        `event`: an instance of a class in `hpctrain.trace.events`; `text`: the event as a sentence.
        """
        frame = self._frame("events", rank)
        found = [event_of(kind, json) for kind, json in zip(frame["kind"], frame.pop("json"), strict=True)]
        frame["kind"] = [event.kind for event in found]
        frame.insert(4, "text", list(map(str, found)))
        frame.insert(5, "event", np.fromiter(found, object, len(found)))
        return frame.sort_values("t_ns", kind="stable", ignore_index=True)

    def clock(self, rank: Ranks = None) -> pd.DataFrame:
        """Columns rank, attempt, t_ns (corrected), offset_ns, error_ns, t_s: the clock offsets used for correction."""
        return self._frame("clock", rank)

    def device(self, rank: Ranks = None) -> pd.DataFrame:
        """Columns rank, attempt, step, kind, start_ns, end_ns, error_ns, start_s, end_s: when devices worked on spans;
        see `schema.DEVICE`. Empty for a run on CPUs."""
        frame = self._frame("device", rank)
        frame["kind"] = _categories(frame["kind"].to_numpy(), KINDS)
        return frame

    def metrics(self) -> pd.DataFrame:
        """metrics.csv, one row per evaluation; empty if there were none."""
        import pandas as pd

        try:
            lines = read_regular(self.folder / METRICS, LONGEST_METRICS).decode(errors="replace").splitlines()
            head, *rows = csv.reader(lines)
            whole = [head, *(row for row in rows if len(row) == len(head))]
            frame = pd.read_csv(io.StringIO("\n".join(map(_csv_line, whole))), low_memory=False)
        except FileNotFoundError:
            return pd.DataFrame()
        except (OSError, ValueError, OverflowError, csv.Error) as error:  # pandas' parser errors are ValueErrors
            self._note(f"metrics.csv cannot be read ({str(error).splitlines()[0]})")
            return pd.DataFrame()
        without = frame["loss"].isna() if "loss" in frame else None  # evaluations of a model that returned none
        for name in frame.columns.drop("split", errors="ignore"):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
        if "split" in frame:
            frame["split"] = [shown(name, 20) if isinstance(name, str) else name for name in frame["split"]]
        own = [name for name in frame.columns if name.startswith("metric.")]  # any of these may be NaN
        there = frame[frame.columns.drop(own)].notna()
        if without is not None:
            there["loss"] |= without
        known = frame[there.all(axis=1)].reset_index(drop=True)
        if len(known) < len(rows):
            self._note(f"metrics.csv: {len(rows) - len(known)} of {len(rows)} rows cannot be read")
        return known

    def _frame(
        self, table: str, rank: Ranks, keep: Keep | None = None, columns: Iterable[str] | None = None
    ) -> pd.DataFrame:
        import pandas as pd

        names = list(TABLES[table].names or ()) if columns is None else list(columns)
        parts: dict[str, list[Rows]] = {name: [np.zeros(0, TABLES[table][name])] for name in names}
        ranks, attempts, counts = [], [], []
        for file in self._select(rank):
            for block in self._blocks(file, table, BLOCK_ROWS, names, keep):
                for name in names:
                    parts[name].append(block[name].copy())  # a copy, so that the rest of the block can be freed
                ranks.append(file.rank)
                attempts.append(file.attempt)
                counts.append(len(block))
        frame: dict[str, Any] = {
            "rank": np.repeat(np.array(ranks, np.int32), counts),
            "attempt": np.repeat(np.array(attempts, np.int16), counts),
        }
        for name in names:
            frame[name] = np.concatenate(parts.pop(name))
        for name in TIMES:
            if name in frame:
                frame[name.replace("_ns", "_s")] = (frame[name] - self.start_ns) / 1e9
        return pd.DataFrame(frame, copy=False)


# -- files ---------------------------------------------------------------------------------------------------
def run_folder(path: Path) -> Path:
    """The run folder that `path` names or lies in. Raises TraceError."""
    if not path.exists():
        raise TraceError(f"{path}: no such run folder")
    folder = path if path.is_dir() else path.parent
    if folder.name == "trace" and not (folder / "trace").exists():
        folder = folder.parent
    if not (folder / "trace").is_dir() and not (folder / JOB).exists():
        raise TraceError(f"{path}: not a run folder (it has neither trace/ nor job.toml); give a folder runs/...")
    return folder


def size_of(files: Sequence[TraceFile]) -> int:
    """The number of ranks of an attempt: what most of its files say, but never less than its highest rank + 1."""
    sizes = Counter(file.attributes["size"] for file in files if "size" in file.attributes)
    size = min(sizes, key=lambda size: (-sizes[size], size), default=0)
    return max([int(size), *(file.rank + 1 for file in files)])


def _fault_text(attempt: int, reason: str, errors: Mapping[int, UnreadableTrace]) -> str:
    """Describe a fault that the files of one or more ranks share."""
    if len(errors) == 1:
        return str(*errors.values())
    which = f" of attempt {attempt}" if attempt > 1 else ""
    return f"{name_ranks(sorted(errors))}: each of their files{which} in trace/ {reason}"


def _csv_line(row: list[str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' if set(cell) & set('",\r\n') else cell for cell in row)


def _categories(codes: Rows, names: Sequence[str]) -> Any:
    import pandas as pd

    known: np.ndarray[Any, np.dtype[np.int64]] = np.where(codes <= len(names), codes.astype(np.int64) - 1, -1)
    return pd.Categorical.from_codes(known, categories=pd.Index(list(names)))


def name_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
