"""Opens trace files for reading, damaged ones and those of killed ranks included."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.errors import TraceError
from hpctrain.registry import escaped
from hpctrain.trace.schema import OLDER_VERSIONS, SCHEMA_VERSION, TABLES

Rows = np.ndarray[Any, Any]
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError)  # what h5py raises on damaged files


class UnreadableTrace(TraceError):
    """A file that is left out. `reason`: what is wrong with it, to follow its name."""

    def __init__(self, path: Path, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: trace/{path.name} {reason}")
        self.reason = reason


@dataclass
class TraceFile:
    """One rank's file of one attempt. `rows`: how many each table really has; `claimed`: how many it should have,
    -1 where even that cannot be read. `shift`: from this attempt's clock of rank 0 to the first's.
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

    def correct(self, t_ns: Rows) -> Rows:
        """Times (int64) of this rank's clock on the run's: linear between the measured offsets."""
        if not len(self.clock):
            return t_ns + self.shift
        if not np.ptp(self.clock["offset_ns"]):
            return t_ns + (int(self.clock["offset_ns"][0]) + self.shift)
        # Relative to the first measurement, because float64 does not hold nanoseconds of a calendar.
        base_t, base = int(self.clock["t_ns"][0]), int(self.clock["offset_ns"][0])
        drift = np.interp(t_ns - base_t, self.clock["t_ns"] - base_t, self.clock["offset_ns"] - base)
        return t_ns + np.rint(drift).astype(np.int64) + (base + self.shift)


def open_h5(path: Path) -> Any:
    """The file, opened through SWMR: nothing else opens one being written, or of a killed rank."""
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    access.set_file_locking(False, True)
    # Damaged metadata is read again after 1 ns, 2 ns, 4 ns ...: by default 100 times, which is for ever. 22
    # times are 4 ms, plenty for metadata that was being written. h5py does not show this function of its
    # library.
    ctypes.CDLL(h5py.h5p.__file__).H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(22))
    flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, access))


def open_file(path: Path, rank: int, attempt: int) -> TraceFile:
    """Raises UnreadableTrace for another schema and for a damaged file."""
    try:
        return _open_file(path, rank, attempt)
    except UNREADABLE as error:
        raise UnreadableTrace(path, rank, f"cannot be read: it is damaged or cut ({why(error)})") from None


def _open_file(path: Path, rank: int, attempt: int) -> TraceFile:
    with open_h5(path) as h5:
        attributes = {name: _plain(value) for name, value in h5.attrs.items()}
        version = attributes.get("schema_version")
        if version is None:
            raise UnreadableTrace(path, rank, "has no schema version: it is no trace")
        if version != SCHEMA_VERSION and version not in OLDER_VERSIONS:
            advice = f"this hpctrain reads version {SCHEMA_VERSION}; read it with the hpctrain that wrote it"
            raise UnreadableTrace(path, rank, f"has schema version {version}: {advice}")
        for name, dtype in TABLES.items():
            if h5[name].dtype != dtype:
                raise UnreadableTrace(path, rank, f"does not have the columns of its schema in /{name}")
        counts = {name: _count(h5[name], path) for name in TABLES}
        claimed, rows = ({name: count[i] for name, count in counts.items()} for i in (0, 1))
        clock = read_rows(h5["clock"], 0, rows["clock"])
    clock = clock[np.argsort(clock["t_ns"], kind="stable")]
    return TraceFile(path, rank, attempt, attributes, _closed(path), clock, rows, claimed)


def why(error: Exception) -> str:
    """The library's reason: the last parentheses of "Unable to synchronously open object (...)"."""
    text = str(error).strip("'").splitlines()[0] if str(error) else type(error).__name__
    return text[text.index("(") + 1 :].rstrip(")") if "(" in text else text


def text_of(value: bytes) -> str:
    """Text out of a trace, fit for a terminal."""
    return escaped(value.decode(errors="replace"))


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, str)):
        return text_of(value) if isinstance(value, bytes) else escaped(value)
    return value.item() if isinstance(value, np.generic) else value


def _closed(path: Path) -> bool:
    """Whether its writer closed the file: byte 11 of an HDF5 superblock (version 3) has a writer's flags."""
    with open(path, "rb") as file:
        return not file.read(12)[11] & 0x05


def _count(table: Any, path: Path) -> tuple[int, int]:
    try:
        return rows_there(table, path)
    except UNREADABLE:
        return -1, 0


def rows_there(table: Any, path: Path) -> tuple[int, int]:
    """(rows that the table claims, rows before the first that lies beyond the file's end).

    HDF5 itself reads zeros there, without a word, when the file is opened for SWMR.
    """
    rows, size = table.shape[0], os.path.getsize(path)
    if table.file.id.get_filesize() <= size:
        return rows, rows
    there = rows
    for index in range(table.id.get_num_chunks()):
        chunk = table.id.get_chunk_info(index)
        if chunk.byte_offset + chunk.size > size:
            whole = max(0, size - chunk.byte_offset) // table.dtype.itemsize
            there = min(there, chunk.chunk_offset[0] + whole)
    return rows, there


def read_rows(table: Any, start: int, stop: int) -> Rows:
    """Rows start to stop, without those that never reached the file: unreadable, or zeros throughout."""
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
    """Whether no row can be of zeros, because all have a code: a sixth of the cost of looking at every byte."""
    coded = [name for name in ("kind", "outcome") if name in (rows.dtype.names or ()) and rows.dtype[name] == np.uint8]
    return not len(rows) or any(bool(rows[name].all()) for name in coded)


def align(files: Sequence[TraceFile]) -> None:
    """Bring later attempts, whose clocks may have begun anew, onto the first one's, by the calendar."""
    base: int | None = None
    shifts: dict[int, int] = {}
    for file in files:  # in the order of attempts, then ranks: the lowest rank speaks for its attempt
        stamped = "clock_ns" in file.attributes and "unix_ns" in file.attributes
        if stamped and file.attempt not in shifts:
            moment = np.array([file.attributes["clock_ns"]], np.int64)
            epoch = int(file.attributes["unix_ns"]) - int(file.correct(moment)[0])
            base = epoch if base is None else base
            shifts[file.attempt] = epoch - base
    for file in files:
        file.shift = shifts.get(file.attempt, 0)
