"""Damaged run folders, seeded: readers read what they can, or refuse with a message; never a traceback."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console

from hpctrain.analysis import Analysis, analyse
from hpctrain.errors import HpctrainError
from hpctrain.trace import format_totals, open_run, trace_path
from hpctrain.trace.schema import TABLES
from hpctrain.views import compare
from hpctrain.views.export import export_run
from hpctrain.views.figures import FIGURES
from hpctrain.views.report import write_report
from hpctrain.views.watch.picture import LivePicture, line
from hpctrain.views.watch.watcher import Watcher
from tests.marks import mostly_slow
from tests.traces import HandMade

CASES = 60
JOB = """
name = "fuzz"
model = "mlp"
data = "digits"
train.epochs = 2
[[phases]]
strategy = {name = "parameter_server", mode = "async", colocated = true}
until = {rule = "after", epochs = 1}
[[phases]]
strategy = "all_reduce"
"""
METRICS = """step,samples,epoch,seconds,split,loss,metric
2,128,0.5,0.2,validation,1.5,0.4
4,256,1.0,0.4,validation,1.25,0.5
6,384,2.0,0.7,test,1.0,0.75
"""
SIZE, STEPS = 3, 6
FRAMES = [name for name, value in vars(Analysis).items() if not name.startswith("_") and name != "waiting_matrix"]


def write_run(folder: Path, attempts: int = 1) -> Path:
    """A run of three ranks with everything a trace can contain: two phases, a server thread, messages ..."""
    folder.mkdir()
    for attempt in range(1, attempts + 1):
        with HandMade(folder, SIZE, nodes=[0, 0, 1], offsets=[0.0, 2.5, -7.0], attempt=attempt, job=JOB) as run:
            for rank in range(SIZE):
                _write_rank(run[rank], rank)
    (folder / "metrics.csv").write_text(METRICS)
    return folder


def _write_rank(rank: Any, number: int) -> None:
    link = {"peer": (number + 1) % SIZE, "same_node": True, "latency_s": 1e-6, "bytes_per_s": 1e9}
    rank.event(0.0, "network", json.dumps(link))
    rank.phase(1.0, 0, "worker", "parameter_server (async)")
    for step in range(STEPS):
        at, phase = 10.0 + 120.0 * step, int(step >= STEPS // 2)
        if step == STEPS // 2:
            rank.event(at - 3.0, "rule", "loss_stable: 0.02 <= 0.05")
            rank.event(at - 2.0, "switch", "after 192 >= 192 samples")
            rank.phase(at - 1.0, 1, "worker", "all_reduce")
        rank.resource(at, 50.0 + step, 10**8, 1000 * step, 2000 * step, 10.0, 10**7)
        rank.span("data", at, at + 5, step)
        rank.span("forward", at + 5, at + 20 + 5 * number, step)
        rank.span("backward", at + 20 + 5 * number, at + 60, step)
        rank.span("send", at + 60, at + 65, step, 4096, (number + 1) % SIZE, step)
        rank.span("recv", at + 65, at + 80, step, 4096, (number - 1) % SIZE, step)
        rank.span("reduce", at + 80, at + 90, step, 8192, -1, 100 + step)
        rank.span("update", at + 90, at + 100, step)
        if number == 0:
            rank.span("recv", at + 61, at + 70, step, 4096, 1, 50 + step, lane=1)
            rank.span("update", at + 70, at + 75, step, lane=1)
        columns = {"phase": phase} if phase else {"staleness_min": 0, "staleness_max": step}
        rank.done(at + 100, step, 2.0 / (step + 1), 32, epoch=(step + 1) / 3, cursor=96 * step + 96, **columns)
        if step % 2:
            rank.span("evaluate", at + 100, at + 110, step)
    rank.recorder.clock(rank._offset + 1000, 50)


# -- damage ----------------------------------------------------------------------------------------------------------
def flip_bytes(dice: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 3, 30])):
        place = dice.randrange(min(len(data), dice.choice([200, 4000, len(data)])))
        data[place] = dice.choice([0, 1, 255, data[place] ^ (1 << dice.randrange(8)), dice.randrange(256)])
    path.write_bytes(data)


def cut(dice: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.choice([0, dice.randrange(100), dice.randrange(len(data)), len(data) - 1])])


def blank(dice: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place, length = dice.randrange(len(data)), dice.choice([8, 512, 4096, 65536])
    data[place : place + length] = dice.choice([b"\0", b"\xff"]) * len(data[place : place + length])
    path.write_bytes(data)


ODD_INTEGERS = [
    *(-(2**63), -(2**62), -(2**40), -1000, -2, -1, 0, 1, 2, 3, 7, 15, 16, 100, 255, 2**16, 2**31 - 1, 2**31, 2**40),
    *(10**15, 10**18, 2**60, 2**61, 2**62, 2**63 - 1),
]
ODD_FLOATS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 5e-324, 1e-300, 1e300, 1.7e308, 1e15]
ODD_TEXTS = [
    *(b"", b"\xff\xfe\x80", b"role", b"switch", b"\x1b[2J", b"phase 999999999999999999999999: worker of x", b"%s{}"),
    *(b"phase 0: server of all_reduce", b"phase 3: worker of y", b"phase 1: janitor of z"),
    b'{"peer": 99, "same_node": 1, "latency_s": -1, "bytes_per_s": 0}',
    b'{"peer": 1e999, "same_node": [], "latency_s": NaN, "bytes_per_s": Infinity}',
    *(b"rule: 1e999 <= nan", b"[" * 240, "phase \N{KHMER DIGIT NINE}: worker of x".encode()),
]


def change_rows(dice: random.Random, path: Path) -> None:
    """Change some values of columns, or a whole column."""
    name = dice.choice(["spans"] * 4 + ["steps"] * 3 + list(TABLES))
    with h5py.File(path, "r+") as file:
        rows = _few(file[name])
        for _ in range(dice.choice([1, 2, 5, 20])):
            column = dice.choice(rows.dtype.names)
            place = dice.choice([slice(None), *(dice.randrange(len(rows)) for _ in range(5))])
            rows[column][place] = _odd(dice, rows.dtype[column], rows[column])
        file[name][:] = rows


def _few(table: Any) -> Any:
    """The table's rows, unless earlier damage made it claim very many."""
    if len(table) > 10_000:
        raise ValueError("too many rows")
    return table[:]


def _odd(dice: random.Random, dtype: Any, column: Any) -> Any:
    if dtype.kind == "S":
        return dice.choice(ODD_TEXTS)
    if dtype.kind == "f":
        return dice.choice(ODD_FLOATS)
    value = dice.choice([*ODD_INTEGERS, int(dice.choice(column)) ^ (1 << dice.randrange(8 * dtype.itemsize - 1))])
    return np.array([value & (2 ** (8 * dtype.itemsize) - 1)], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)[0]


def shuffle_rows(dice: random.Random, path: Path) -> None:
    name = dice.choice(list(TABLES))
    with h5py.File(path, "r+") as file:
        rows = _few(file[name])
        order = [dice.randrange(len(rows)) for _ in rows] if dice.random() < 0.5 else list(range(len(rows)))[::-1]
        file[name][:] = rows[order]


def resize(dice: random.Random, path: Path) -> None:
    with h5py.File(path, "r+") as file:
        table = file[dice.choice(list(TABLES))]
        table.resize(dice.choice([0, 1, len(table) + 3, 10**6, 2**40, 2**60]), axis=0)


ATTRIBUTES = ("rank", "size", "node", "attempt", "clock_ns", "unix_ns", "schema_version", "role", "host", "job")


def change_attribute(dice: random.Random, path: Path) -> None:
    odd: list[Any] = [
        *ODD_INTEGERS, *ODD_FLOATS, "", "x", "server", "two", "\x1b[2J<b>$\\frac{$", np.bytes_(b"\xff\xfe"), True,
        np.arange(3), np.array(["a", "b"], object), h5py.Empty("f"), 1j, np.zeros(0), "9" * 40000,
    ]  # fmt: skip
    with h5py.File(path, "r+") as file:
        name = dice.choice(ATTRIBUTES)
        del file.attrs[name]
        if dice.random() < 0.8:
            file.attrs[name] = dice.choice(odd)


def replace_table(dice: random.Random, path: Path) -> None:
    """Replace a table by another type, shape or object, or by a link to another place."""
    name = dice.choice(list(TABLES))
    chunked = {"maxshape": (None,), "chunks": (64,)}
    outside = path.parent.parent.parent / "outside.h5"
    things: list[Callable[[Any], Any]] = [
        lambda file: None,
        lambda file: file.create_group(name),
        lambda file: file.create_dataset(name, (10,), "i8", **chunked),
        lambda file: file.create_dataset(name, (10,), h5py.string_dtype(), **chunked),
        lambda file: file.create_dataset(name, (10, 2), TABLES[name], maxshape=(None, 2), chunks=(8, 2)),
        lambda file: file.create_dataset(name, (), TABLES[name]),
        lambda file: file.create_dataset(name, (10,), TABLES[name]),
        lambda file: file.create_dataset(name, (10,), TABLES[name], compression="gzip", **chunked),
        lambda file: file.create_dataset(name, (10,), TABLES[name], external=[(str(outside), 0, 10**6)]),
        lambda file: file.create_dataset(name, (2**33,), TABLES[name], **chunked),
        lambda file: file.create_dataset(name, data=np.ones(40, np.int8)),
        lambda file: file.__setitem__(name, h5py.ExternalLink(str(outside), f"/{name}")),
        lambda file: file.__setitem__(name, h5py.SoftLink("/nowhere")),
        lambda file: file.__setitem__(name, h5py.SoftLink(f"/{name}")),
    ]
    with h5py.File(path, "r+") as file:
        del file[name]
        dice.choice(things)(file)


def damage_text(dice: random.Random, path: Path) -> None:
    """Damage cells or the whole of metrics.csv or job.toml."""
    text = path.read_bytes()
    cells = [b"", b"nan", b"inf", b"-1", b"1e999", b"9" * 400, b"text", b"\0", b"\xff\xfe", b'"', b"1.5", b"\r", b"a,b"]
    cells.append(b"x" * 200_000)
    for _ in range(dice.choice([1, 2, 6])):
        lines = text.split(b"\n")
        number = dice.randrange(len(lines))
        parts = lines[number].split(b",")
        parts[dice.randrange(len(parts))] = dice.choice(cells)
        lines[number] = b",".join(parts)
        if dice.random() < 0.3:
            lines.insert(dice.randrange(len(lines)), dice.choice([b"", b",", b",,,,,,,,,", b"step,samples", *cells]))
        text = b"\n".join(lines)
    path.write_bytes(dice.choice([text, text, text, text[: dice.randrange(len(text) + 1)], b"", b"\0" * 100]))


def replace_file(dice: random.Random, path: Path) -> None:
    """Replace a file by a folder, a dangling link, another rank's file ..."""
    other = trace_path(path.parent.parent, 0)
    path.unlink()
    dice.choice([
        lambda: None,
        path.mkdir,
        lambda: path.symlink_to("/nowhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: shutil.copyfile(other, path) if other.is_file() else None,
    ])()  # fmt: skip


TO_TRACES = (*[change_rows] * 4, *[flip_bytes, change_attribute] * 2, cut, blank, shuffle_rows, resize, replace_table,
             replace_file)  # fmt: skip
TO_TEXTS = (flip_bytes, cut, blank, damage_text, damage_text, damage_text, replace_file)


def damage(dice: random.Random, folder: Path) -> list[str]:
    """Apply one to three kinds of damage; returns their names."""
    done = []
    for _ in range(dice.choice([1, 1, 2, 3])):
        if dice.random() < 0.15:
            path, how = folder / dice.choice(["metrics.csv", "job.toml"]), dice.choice(TO_TEXTS)
        else:
            path, how = dice.choice(sorted((folder / "trace").glob("rank_*.h5"))), dice.choice(TO_TRACES)
        if not path.is_file():  # replaced already: reading a device would never end
            continue
        try:
            how(dice, path)
            done.append(f"{how.__name__} {path.name}")
        except (OSError, RuntimeError, KeyError, ValueError, IndexError, TypeError, AttributeError, MemoryError):
            continue  # it was too damaged already
    return done


# -- reading ---------------------------------------------------------------------------------------------------------
def readers(folder: Path, beside: Path) -> dict[str, Callable[[], Any]]:
    return {
        "trace": lambda: format_totals(open_run(folder)),
        "frames": lambda: _frames(folder),
        "watch": lambda: _watch(folder),
        "perfetto": lambda: export_run(folder, "perfetto", beside / "p.json", out=io.StringIO()),
        "steps": lambda: export_run(folder, "perfetto", beside / "s.json", steps=range(1, 3), out=io.StringIO()),
        "csv": lambda: export_run(folder, "csv", beside / "csv", out=io.StringIO()),
        "compare": lambda: compare.main([folder], csv=beside / "table.csv"),
        "figures": lambda: draw_figures(folder),
    }


def _frames(folder: Path) -> None:
    """Each frame of the analysis separately, so that one failure does not hide another."""
    analysis = analyse(folder)
    for name in (*FRAMES, "waiting_matrix"):
        try:
            found = getattr(analysis, name)
            found() if callable(found) else None
        except HpctrainError as error:
            assert str(error)


def _watch(folder: Path) -> None:
    watcher = Watcher(folder)
    for _ in range(2):
        shot = watcher.look()
        Console(file=io.StringIO(), width=80).print(LivePicture(shot))
        line(shot)


def draw_figures(folder: Path) -> None:
    analysis = analyse(folder)
    for name in FIGURES:
        try:
            import_module(f"hpctrain.views.figures.{name}").draw(analysis).savefig(io.BytesIO(), dpi=50)
        except HpctrainError as error:
            assert str(error)


def attempt(what: str, read: Callable[[], Any]) -> None:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            read()
    except HpctrainError as error:
        assert str(error).strip() and "\x1b" not in str(error), what


def try_case(seed: int, original: Path, place: Path, what: str) -> None:
    """Damage a copy of the run `original` and let one of the `readers` read it."""
    folder = place / f"run{seed}"
    shutil.copytree(original, folder, symlinks=True)
    damages = damage(random.Random(seed), folder)
    try:
        attempt(what, readers(folder, place)[what])
    except Exception as error:
        error.add_note(f"seed {seed}: {what}, after {', '.join(damages)}")
        raise
    shutil.rmtree(folder)


# -- the tests -------------------------------------------------------------------------------------------------------
READERS = ("trace", "watch", "perfetto", "frames", "watch", "csv", "trace", "steps", "watch", "compare", "perfetto")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    return write_run(place / "run", 1), write_run(place / "resumed", 2)


def test_undamaged_runs_are_read_without_a_note(originals, tmp_path):
    for original in originals:
        run = open_run(original)
        format_totals(run)
        assert run.notes == [] and run.size == SIZE
        assert Watcher(original).look().notes == ()
        _frames(original)
        export_run(original, "perfetto", tmp_path / "p.json")


@pytest.mark.parametrize("tenth", mostly_slow(range(10), (0,)))
def test_damaged_runs_are_read_as_far_as_possible(originals, tmp_path, tenth):
    """One reader per case, to save time; thousands of cases with all readers were run by hand."""
    for seed in range(tenth, CASES, 10):
        try_case(seed, originals[seed % 2], tmp_path, READERS[seed % len(READERS)])


@pytest.mark.slow
def test_report_of_damaged_traces_notes_the_damage(originals, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(originals[0], run)
    with h5py.File(trace_path(run, 1), "r+") as file:
        rows = file["spans"][:]
        rows["kind"][3], rows["end_ns"][5], rows["peer"][7], rows["start_ns"][9] = 200, -(2**62), 10**6, 2**62
        file["spans"][:] = rows
        file.attrs["size"], file.attrs["role"] = 2**40, np.arange(3)
    _, headline = write_report(run)
    page = (run / "report.html").read_text()
    assert "4 of 45 rows of /spans of trace/rank_00001.h5 cannot be read: the file is damaged or truncated" in page
    assert "trace/rank_00001.h5 is damaged: invalid size, role" in page.replace("role, size", "size, role")
    assert "could not be" not in page and "worker time" in headline


def set_rows(path: Path, table: str, place: int | slice, **values: Any) -> None:
    with h5py.File(path, "r+") as file:
        rows = file[table][:]
        for name, value in values.items():
            rows[name][place] = value
        file[table][:] = rows


IMPOSSIBLE = [
    *(("spans", name, value) for name, value in {"kind": 16, "lane": 3, "peer": 3, "step": -2, "id": -2}.items()),
    *(("spans", name, value) for name, value in {"start_ns": 2**60, "end_ns": 0, "bytes": 2**62}.items()),
    *(("steps", name, value) for name, value in {"outcome": 0, "epoch": float("nan"), "samples": -1}.items()),
    *(("steps", name, value) for name, value in {"t_ns": -(2**63), "cursor": -5, "staleness_max": -9}.items()),
    *(("events", "t_ns", 2**62), ("resources", "cpu", float("inf")), ("resources", "resident", -2)),
]


@pytest.mark.parametrize(("table", "column", "value"), IMPOSSIBLE)
def test_impossible_rows_are_left_out_with_a_note(originals, tmp_path, table, column, value):
    shutil.copytree(originals[0], tmp_path / "run")
    set_rows(trace_path(tmp_path / "run", 1), table, 4, **{column: value})
    whole, run = open_run(originals[0]), open_run(tmp_path / "run")
    there, left = (len(getattr(one, table)(1)) for one in (whole, run))
    assert left == there - 1
    lost = f"rank 1: 1 of {there} rows of /{table} of trace/rank_00001.h5 cannot be read: "
    lost += "the file is damaged or truncated"
    assert run.notes == [lost] and whole.notes == []
    if table in ("spans", "steps", "events"):
        shot = Watcher(tmp_path / "run").look()
        assert (shot.notes == ("rank 1: 1 damaged rows of its trace are left out",)) is (column != "peer")


def test_impossible_counts_cost_neither_memory_nor_time(originals, tmp_path):
    shutil.copytree(originals[0], tmp_path / "run")
    with h5py.File(trace_path(tmp_path / "run", 1), "r+") as file:
        file["spans"].resize(2**60, axis=0)
        file.attrs["size"], file.attrs["node"] = 10**6, 10**6
    tracemalloc.start()
    try:
        assert "cannot be read" in format_totals(open_run(tmp_path / "run"))
        assert open_run(tmp_path / "run").size == SIZE  # as the other two files state
        analyse(tmp_path / "run").waiting_matrix()
        assert Watcher(tmp_path / "run").look().size == SIZE
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_run_claiming_a_million_ranks_gets_no_matrix(originals, tmp_path):
    shutil.copytree(originals[0], tmp_path / "run")
    for rank in range(SIZE):
        with h5py.File(trace_path(tmp_path / "run", rank), "r+") as file:
            file.attrs["size"] = 10**6
    analysis = analyse(tmp_path / "run")
    for make in (analysis.waiting_matrix, lambda: import_module("hpctrain.views.figures.communication").draw(analysis)):
        with pytest.raises(HpctrainError, match=r"a matrix of 1,000,000 ranks is too large"):
            make()
    assert "ranks 3-999999 of 1000000: no trace file" in format_totals(analysis.run)
    assert Watcher(tmp_path / "run").look().notes == ("no trace file yet from ranks 3-999999",)


def test_too_small_epoch_gives_no_total():
    watcher: Any = SimpleNamespace(_attempt=SimpleNamespace(cursor=2**62, epoch=5e-324))
    assert Watcher._total(watcher) is None


def test_damaged_clock_measurement_shifts_no_time(originals, tmp_path):
    shutil.copytree(originals[0], tmp_path / "run")
    set_rows(trace_path(tmp_path / "run", 1), "clock", 1, offset_ns=-(2**62))
    whole, run = open_run(originals[0]).spans(1), open_run(tmp_path / "run").spans(1)
    assert (whole["start_ns"] - run["start_ns"]).abs().max() <= 1000  # the drift from the second measurement
    shutil.copytree(originals[0], tmp_path / "far")
    set_rows(trace_path(tmp_path / "far", 1), "clock", slice(None), offset_ns=2**62)
    assert open_run(tmp_path / "far").notes == [
        "rank 1: trace/rank_00001.h5 is dated years from the others: its clocks are damaged"
    ]


def test_nothing_outside_the_run_folder_is_read(originals, tmp_path):
    """Links, external storage and virtual tables would read other files; a pipe would block, a device never end."""
    other = trace_path(originals[0], 0)
    for number, name in enumerate(("link", "storage", "virtual")):
        run = tmp_path / name
        shutil.copytree(originals[0], run)
        with h5py.File(trace_path(run, 1), "r+") as file:
            rows = len(file["spans"])
            del file["spans"]
            if number == 0:
                file["spans"] = h5py.ExternalLink(str(other), "/spans")
            elif number == 1:
                file.create_dataset("spans", (9,), TABLES["spans"], external=[(str(other), 0, 10**6)])
            else:
                layout = h5py.VirtualLayout((rows,), TABLES["spans"], maxshape=(None,))
                layout[:] = h5py.VirtualSource(str(other), "spans", (rows,), TABLES["spans"])
                file.create_virtual_dataset("spans", layout)
        opened = open_run(run)
        assert opened.ranks == [0, 2], name
        wrong = "links to data elsewhere" if number == 0 else "has a storage layout that traces do not use"
        assert opened.notes == [f"rank 1: trace/rank_00001.h5 {wrong} in /spans"]
    for path in ("job.toml", "metrics.csv", "trace/rank_00001.h5"):
        (run / path).unlink()
        os.mkfifo(run / path)
    opened = open_run(run)
    assert opened.ranks == [0, 2] and opened.metrics().empty and "parameter_server" in opened.job_text
    assert Watcher(run).look().evaluations == ()
