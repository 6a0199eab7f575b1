"""Writes a rank's trace: one HDF5 file that can be read while it grows (SWMR) and that survives kill -9.

In SWMR mode nothing new can be created; datasets can only be appended to. So every dataset and attribute exists from
the start, and strings have a fixed length.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.errors import TraceError
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import SCHEMA_VERSION, TABLES, Kind

# Rows per chunk. A flush rewrites the last chunk, so tables that grow slowly get small chunks.
CHUNK_ROWS = {"spans": 4096, "steps": 512, "resources": 256, "events": 32, "clock": 128, "device": 1024}
_FILE_NAME = re.compile(r"rank_([0-9]{5,6})(?:\.([0-9]{1,4}))?\.h5")


def trace_path(folder: Path | str, rank: int, attempt: int = 1) -> Path:
    """The path of a rank's trace file in the run folder; `attempt` counts from 1 and grows with each resumption."""
    suffix = f".{attempt}.h5" if attempt > 1 else ".h5"
    return Path(folder) / "trace" / f"rank_{rank:05d}{suffix}"


def trace_files(folder: Path | str) -> dict[tuple[int, int], Path]:
    """The trace files of the run folder by (attempt, rank), sorted by these."""
    found = {}
    trace = Path(folder) / "trace"
    for entry in os.scandir(trace) if trace.is_dir() else ():
        match = _FILE_NAME.fullmatch(entry.name)
        if match and entry.is_file():  # opening a pipe would block
            found[int(match[2] or 1), int(match[1])] = trace / entry.name
    return dict(sorted(found.items()))


def next_attempt(folder: Path | str) -> int:
    """The number of the attempt about to begin in this run folder: 1 in a new one. Not collective."""
    return max((attempt for attempt, _ in trace_files(folder)), default=0) + 1


class TraceWriter:
    """Appends the content of `recorder` to `path` every `flush_seconds`.

    `attributes`: rank, size, host, node, role, device, job (TOML text), attempt, library versions: str, int,
    float or bool. The file gets its final name only once it can be read. Raises TraceError if it cannot be created.
    A later error (a full disk, for example) ends the trace but not the run: one line goes to stderr, `stopped` says
    what happened, and no method raises. Not collective; call every method from the thread of lane 0.
    """

    def __init__(
        self, path: Path | str, recorder: Recorder, attributes: Mapping[str, Any], flush_seconds: float = 2.0
    ) -> None:
        self.path = Path(path)
        self.recorder = recorder
        self.stopped: str | None = None
        self._rank = attributes.get("rank", 0)
        self._interval = int(flush_seconds * 1e9)
        self._due = recorder.now() + self._interval
        self._file: Any = None
        self._tables: dict[str, Any] = {}
        self._create({**attributes, "schema_version": SCHEMA_VERSION})

    def _create(self, attributes: Mapping[str, Any]) -> None:
        import h5py

        if self.path.exists():
            raise TraceError(f"{self.path}: this trace already exists; a resumed run must write the next attempt")
        unfinished = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(unfinished, "w", libver="latest", locking=False)
            for name, value in attributes.items():
                self._file.attrs[name] = _attribute(value)
            # The same moment on the trace's clock and in calendar time: used to align attempts, whose clocks
            # may differ.
            self._file.attrs["clock_ns"], self._file.attrs["unix_ns"] = self.recorder.now(), time.time_ns()
            for name, dtype in TABLES.items():
                chunk = (CHUNK_ROWS[name],)
                self._tables[name] = self._file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=chunk)
            self._file.swmr_mode = True
            self._file.flush()
            os.replace(unfinished, self.path)
        except (OSError, RuntimeError) as error:
            self._abandon()
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise TraceError(
                f"{self.path}: the trace cannot be written here ({_reason(error)}); "
                "free space, choose another place (output = ...), or set trace.enabled = false"
            ) from None

    def maybe_flush(self, now_ns: int) -> bool:
        """Flush if it is due; return whether it was. Costs almost nothing otherwise: call it every step."""
        if now_ns < self._due:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Append everything recorded and pass it to the file system. Records itself as a span of kind `trace`."""
        recorder = self.recorder
        recorder.open(Kind.TRACE, recorder.now())
        try:
            self._append()
        finally:
            now = recorder.now()
            recorder.close(now)
            self._due = now + self._interval

    def close(self) -> None:
        """Flush and close the file. Spans still open are lost. May be called more than once."""
        if self._file is not None:
            self.flush()
            self._append()  # writes the span of the flush itself
        if self._file is not None:
            try:
                self._file.close()
            except Exception as error:
                self._stop(error)
            self._file, self._tables = None, {}

    def _append(self) -> None:
        try:
            rows = self.recorder.drain()  # even after the trace has ended: memory must not grow
            if self._file is None:
                return
            for name, table in self._tables.items():
                block = rows[name]
                if len(block):
                    end = table.shape[0]
                    table.resize(end + len(block), axis=0)
                    table[end:] = block
                    table.flush()
        except Exception as error:  # an error in tracing must not end the run
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        if self.stopped is None:
            self.stopped = f"rank {self._rank}: the trace {self.path} ends here ({_reason(error)})"
            with contextlib.suppress(OSError):
                text = f"{self.stopped}; the run continues, but what this rank does from now on is not traced"
                print(f"hpctrain: warning: {text}", file=sys.stderr, flush=True)
        self._abandon()

    def _abandon(self) -> None:
        """Leave the file as a killed rank would. HDF5 crashes the process when it cannot write its remaining buffers
        (at exit at the latest), so its writes are redirected to an unused memory file.
        """
        file, self._file, self._tables = self._file, None, {}
        if file is None:
            return
        with contextlib.suppress(Exception):  # that the trace ends here has been reported; it must not end the run
            sink = os.memfd_create("hpctrain-trace")
            os.dup2(sink, file.id.get_vfd_handle())
            os.close(sink)
            file.close()


def _attribute(value: Any) -> Any:
    """Strings as fixed-length UTF-8. HDF5 has no empty strings: they become a zero byte, which reads back as empty."""
    return np.bytes_(value.encode() or b"\0") if isinstance(value, str) else value


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number is None:
        match = re.search(r"errno = (\d+)", str(error))
        number = int(match[1]) if match else None
    if number:
        return os.strerror(number)
    text = str(error).partition("\n")[0]
    return text if text and isinstance(error, (OSError, RuntimeError)) else f"{type(error).__name__}: {text}"


def link_ranks(folder: Path | str) -> Path:
    """Write `trace.h5`, which links to all ranks' files: /rank_00003, /rank_00003.2 ...; returns its path.

    To be called by one rank, after all ranks have created their TraceWriter. Raises TraceError.
    """
    import h5py

    path = Path(folder) / "trace.h5"
    unfinished = path.with_name("trace.h5.part")
    try:
        with h5py.File(unfinished, "w", libver="latest", locking=False) as file:
            file.attrs["schema_version"] = SCHEMA_VERSION
            for target in trace_files(folder).values():
                file[target.name.removesuffix(".h5")] = h5py.ExternalLink(f"trace/{target.name}", "/")
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise TraceError(f"{path}: cannot be written ({_reason(error)})") from None
    return path
