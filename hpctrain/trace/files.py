"""Opens trace files for reading, including damaged ones and those of killed ranks."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from hpctrain.errors import TraceError
from hpctrain.text import escaped, shown
from hpctrain.trace.events import Event, from_json
from hpctrain.trace.schema import SCHEMA_VERSION, TABLES
from hpctrain.trace.soundness import FARTHEST_NS, LONGEST_NS, MOST_RANKS, made_ns, sound_attribute, sound_rows
from hpctrain.trace.versions import OLDER_VERSIONS, layout, upgraded

Rows = np.ndarray[Any, Any]
# What h5py raises on damaged files.
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
LONGEST_CHUNK = 1 << 16  # rows: the most held in memory at a time
WITH_LINES = ("job", "mpi")  # attributes with several lines of text
MOST_LETTERS = 200  # of a text in any other attribute


class UnreadableTrace(TraceError):
    """Raised for a trace file that has to be left out. `reason`: what is wrong with it, as text to follow its name."""

    def __init__(self, path: Path, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: trace/{path.name} {reason}")
        self.reason = reason


@dataclass
class TraceFile:
    """One rank's file of one attempt.

    `attributes`: the valid attributes; `faults`: the names of the invalid ones. `made_ns`: when the file was made, by
    its own clock. `rows`: the number of rows each table really has; `claimed`: the number it should have, -1 where
    even that cannot be read. `shift`: offset from this attempt's rank 0 clock to that of the first attempt.
    """

    path: Path
    rank: int
    attempt: int
    attributes: dict[str, Any]
    closed: bool
    clock: Rows
    rows: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    shift: int = 0
    made_ns: int = 0
    faults: tuple[str, ...] = ()

    @property
    def simulated(self) -> str:
        """The cluster that the rank was simulated on, in words; "" if it was a real one."""
        return str(self.attributes.get("simulated", ""))

    @property
    def version(self) -> int:
        """The version of the file's schema."""
        return int(self.attributes["schema_version"])

    def sound(self, table: str, rows: Rows, ranks: int = MOST_RANKS) -> Rows:
        """The plausible ones among `rows` (as read from the file), converted from the file's schema version to
        `schema.TABLES`. `ranks`: the number of ranks in the run."""
        return sound_rows(table, upgraded(table, rows, self.version), self.made_ns, ranks)

    def correct(self, t_ns: Rows) -> Rows:
        """Convert times (int64) from this rank's clock to the run's: linear between the measured offsets."""
        if not len(self.clock):
            return t_ns + self.shift
        if not np.ptp(self.clock["offset_ns"]):
            return t_ns + (int(self.clock["offset_ns"][0]) + self.shift)
        # Relative to the first measurement, because float64 cannot represent calendar time in nanoseconds.
        base_t, base = int(self.clock["t_ns"][0]), int(self.clock["offset_ns"][0])
        drift = np.interp(t_ns - base_t, self.clock["t_ns"] - base_t, self.clock["offset_ns"] - base)
        return t_ns + np.rint(drift).astype(np.int64) + (base + self.shift)


def open_h5(path: Path) -> Any:
    """Open a file through SWMR: nothing else can open a file being written, or one left by a killed rank."""
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    access.set_file_locking(False, True)
    # HDF5 retries damaged metadata after 1 ns, 2 ns, 4 ns ...: by default 100 times, which never ends. 22
    # retries take 4 ms, enough for metadata that is being written. h5py does not expose this HDF5 function.
    ctypes.CDLL(h5py.h5p.__file__).H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(22))
    flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, access))


def read_regular(path: Path, most: int) -> bytes:
    """Read at most `most` bytes of a file. Raises OSError, also for pipes and devices, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file")
    with open(path, "rb") as file:
        return file.read(most)


def open_file(path: Path, rank: int, attempt: int) -> TraceFile:
    """Open a trace file. Raises UnreadableTrace for an unknown schema version or a damaged file."""
    try:
        return _open_file(path, rank, attempt)
    except UNREADABLE as error:
        raise UnreadableTrace(path, rank, f"cannot be read: it is damaged or truncated ({why(error)})") from None


def _open_file(path: Path, rank: int, attempt: int) -> TraceFile:
    with open_h5(path) as h5:
        attributes, faults = _attributes(h5)
        version = attributes.get("schema_version")
        if version is None:
            raise UnreadableTrace(path, rank, "has no schema version, so it is not a trace")
        if version != SCHEMA_VERSION and version not in OLDER_VERSIONS:
            advice = f"this hpctrain reads version {SCHEMA_VERSION}; read it with the hpctrain that wrote it"
            raise UnreadableTrace(path, rank, f"has schema version {version}: {advice}")
        tables = layout(version)
        for name in tables:
            if fault := _layout_fault(h5, name, tables[name]):
                raise UnreadableTrace(path, rank, f"{fault} in /{name}")
        counts = {name: _count(h5[name], path) if name in tables else (0, 0) for name in TABLES}
        claimed, rows = ({name: count[i] for name, count in counts.items()} for i in (0, 1))
        clock = read_rows(h5["clock"], 0, rows["clock"])
    made = made_ns(attributes, clock)
    clock = _sound_clock(clock, made)
    return TraceFile(path, rank, attempt, attributes, _closed(path), clock, rows, claimed, 0, made, faults)


def _attributes(h5: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the valid attributes of the file, the names of the invalid ones)."""
    found, faults = {}, []
    for name in h5.attrs:
        try:
            value = _plain(h5.attrs[name], name) if h5.attrs.get_id(name).shape == () else None
        except UNREADABLE:
            value = None
        if sound_attribute(name, value):
            found[name] = value
        else:
            faults.append(shown(name, MOST_LETTERS))
    return found, tuple(faults)


def _layout_fault(h5: Any, name: str, dtype: np.dtype[Any]) -> str | None:
    """How a table's layout differs from that of a trace, or None. All data must lie in the file itself, not in files
    that it links to, and must be readable without extras that a file can request, such as a filter."""
    import h5py

    link = h5.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        return "links to data elsewhere"
    table = h5[name]
    if not isinstance(table, h5py.Dataset) or table.ndim != 1 or table.dtype != dtype:
        return "lacks the columns of its schema"
    if table.chunks is None or not 1 <= table.chunks[0] <= LONGEST_CHUNK or table.id.get_create_plist().get_nfilters():
        return "has a storage layout that traces do not use"
    return None


def _sound_clock(clock: Rows, made: int) -> Rows:
    """The plausible clock measurements, sorted by time. If they contradict one another (time would go backwards), only
    the most exact one."""
    clock = sound_rows("clock", clock, made)
    clock = clock[np.argsort(clock["t_ns"], kind="stable")]
    if len(clock):
        offsets = np.sort(clock["offset_ns"])
        middle = min(offsets[(len(clock) - 1) // 2], offsets[len(clock) // 2], key=abs)
        clock = clock[np.abs(clock["offset_ns"] - middle) <= LONGEST_NS]
    if (np.diff(clock["t_ns"] + clock["offset_ns"]) < 0).any():
        best = int(clock["error_ns"].argmin())
        return clock[best : best + 1]
    return clock


def why(error: Exception) -> str:
    """The library's reason: the parentheses in "Unable to synchronously open object (...)"."""
    text = str(error).strip("'").splitlines()[0] if str(error) else type(error).__name__
    return text[text.index("(") + 1 :].rstrip(")") if "(" in text else text


def event_of(kind: bytes, json: bytes) -> Event:
    """The event in a row of /events."""
    return from_json(kind.decode(errors="replace"), json.decode(errors="replace"))


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, (bytes, str)):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        return escaped(text) if name in WITH_LINES else shown(text, MOST_LETTERS)
    return value.item() if isinstance(value, np.generic) else value


def _closed(path: Path) -> bool:
    """Whether its writer closed the file: byte 11 of an HDF5 superblock (version 3) holds the writer's flags."""
    with open(path, "rb") as file:
        return not file.read(12)[11] & 0x05


def _count(table: Any, path: Path) -> tuple[int, int]:
    try:
        return rows_there(table, path)
    except UNREADABLE:
        return -1, 0


def rows_there(table: Any, path: Path) -> tuple[int, int]:
    """(rows that the table claims, rows before the first that lies beyond the end of the file).

    Beyond it HDF5 silently reads zeros when the file is opened for SWMR. The second number never exceeds what the file
    has room for, however many rows are claimed.
    """
    rows, size = table.shape[0], os.path.getsize(path)
    there = min(rows, size // table.dtype.itemsize)
    if table.file.id.get_filesize() <= size:
        return rows, there
    for index in range(table.id.get_num_chunks()):
        chunk = table.id.get_chunk_info(index)
        if chunk.byte_offset + chunk.size > size:
            whole = max(0, size - chunk.byte_offset) // table.dtype.itemsize
            there = min(there, chunk.chunk_offset[0] + whole)
    return rows, there


def read_rows(table: Any, start: int, stop: int) -> Rows:
    """Rows start to stop, without those that never reached the file: unreadable or all zeros."""
    try:
        rows: Rows = table[start:stop]
    except UNREADABLE:
        pieces, step = [np.zeros(0, table.dtype)], table.chunks[0]
        for begin in range(start - start % step, stop, step):
            try:
                pieces.append(table[max(begin, start) : min(begin + step, stop)])
            except UNREADABLE:
                continue
        rows = np.concatenate(pieces)
    if _all_coded(rows):
        return rows
    there = rows.view((np.uint8, (rows.dtype.itemsize,))).any(axis=1)
    return rows if there.all() else rows[there]


def _all_coded(rows: Rows) -> bool:
    """Whether no row can be all zeros because each has a code: a sixth of the cost of checking every byte."""
    coded = [name for name in ("kind", "outcome") if name in (rows.dtype.names or ()) and rows.dtype[name] == np.uint8]
    return not len(rows) or any(bool(rows[name].all()) for name in coded)


def strays(files: Sequence[TraceFile]) -> list[TraceFile]:
    """The files that, by their corrected clocks, were made years apart from the others of their attempt. Ranks make
    their files together, so the clocks of these files must be damaged."""
    made = {id(file): int(file.correct(np.array([file.made_ns], np.int64))[0]) for file in files}
    middle = {file.attempt: median_low(made[id(of)] for of in files if of.attempt == file.attempt) for file in files}
    return [file for file in files if abs(made[id(file)] - middle[file.attempt]) > FARTHEST_NS]


def align(files: Sequence[TraceFile]) -> None:
    """Align the clocks of later attempts, which may have been reset, with the first attempt's by calendar time."""
    base: int | None = None
    shifts: dict[int, int] = {}
    for file in files:  # ordered by attempt, then rank: the lowest rank's clock is used for its attempt
        stamped = "clock_ns" in file.attributes and "unix_ns" in file.attributes
        if stamped and file.attempt not in shifts:
            moment = np.array([file.attributes["clock_ns"]], np.int64)
            epoch = int(file.attributes["unix_ns"]) - int(file.correct(moment)[0])
            base = epoch if base is None else base
            shifts[file.attempt] = epoch - base
    for file in files:
        shift = shifts.get(file.attempt, 0)
        file.shift = shift if abs(shift) <= FARTHEST_NS else 0
