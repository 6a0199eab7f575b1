"""How fast the traces of a large run can be read, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.errors import TraceError
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import SPANS, STEPS
from hpctrain.trace.writer import TraceWriter, trace_path

RANKS, SPANS_EACH = 64, 1_000_000
REPETITIONS = 3
LIMIT_SECONDS, LIMIT_MIB = 30.0, 2048.0
STEP = ("data", "forward", "backward", "send", "recv", "wait", "reduce", "update")  # spans of a step
FLUSH_STEPS = 1000
# A separate process, so that what this one has loaded does not count. Only VmHWM is not inherited from the parent.
PROGRAM = """
import json, sys, time
begin = time.perf_counter()
from hpctrain.trace import open_run, sum_times
sum_times(open_run(sys.argv[1]))
seconds = time.perf_counter() - begin
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""


def measure_read(progress: Callable[[str], None]) -> FigureTable:
    """Time to compute totals per rank and kind of a large run, from the start of Python to the data frame.

    The run is created in the temporary folder, with fewer spans if space is short. Raises TraceError if there is not
    enough space.
    """
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as name:
        folder = Path(name)
        spans = spans_that_fit(shutil.disk_usage(folder).free)
        if not spans:
            raise TraceError(f"{folder.parent}: too little space for traces to read; set TMPDIR to a folder with more")
        progress(f"read: writing {RANKS} ranks of {spans:,} spans")
        write_run(folder, RANKS, spans)
        size = sum(path.stat().st_size for path in (folder / "trace").iterdir()) / 2**20
        taken = []
        for repetition in range(REPETITIONS):
            progress(f"read, {repetition + 1} of {REPETITIONS}")
            taken.append(summarise(folder))
    return _table(spans, size, taken)


def spans_that_fit(free: int) -> int:
    """Spans per rank that fill at most half of `free` bytes: SPANS_EACH, or a half, a quarter ... of it; or 0."""
    per_span = SPANS.itemsize + STEPS.itemsize / len(STEP)
    spans = SPANS_EACH
    while spans and 2 * RANKS * spans * per_span > free:
        spans //= 2
    return spans


def write_run(folder: Path, ranks: int, spans: int) -> None:
    """Write a run folder of `ranks` ranks with about `spans` spans each. All files are copies of rank 0's."""
    now = 10**9

    def clock() -> int:
        return now

    recorder = Recorder(clock)
    path = trace_path(folder, 0)
    writer = TraceWriter(path, recorder, {"rank": 0, "size": ranks, "role": "worker", "node": 0, "attempt": 1})
    recorder.clock(-12_345, 500)
    for step in range(spans // len(STEP)):
        recorder.step = step
        for kind in STEP:
            recorder.open(kind, now, 4096, peer=step % ranks, id=step)
            now += 600_000
            recorder.close(now)
        recorder.step_done(step / 1000, 1.0, 32, 0.1)
        if step % FLUSH_STEPS == 0:
            writer.flush()
    recorder.clock(4_000_000, 500)  # the clock has drifted: every time must be corrected
    writer.close()
    for rank in range(1, ranks):
        shutil.copyfile(path, trace_path(folder, rank))


def summarise(folder: Path) -> tuple[float, float]:
    """(seconds, peak memory in MiB) of a process that summarises the run in `folder`."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the reading process ended with status {done.returncode}:\n{done.stderr}")
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def _table(spans: int, size: float, taken: list[tuple[float, float]]) -> FigureTable:
    table = FigureTable(
        "read",
        "read: hpctrain.trace.sum_times of a run just written, in a separate process",
        ["spans, millions", "files, MiB", "seconds", "limit, s", "peak, MiB", "limit, MiB"],
    )
    seconds, peak = Sample(tuple(s for s, _ in taken), "s"), Sample(tuple(m for _, m in taken), "MiB")
    cells = (Sample((RANKS * spans / 1e6,), "1e6"), Sample((size,), "MiB"), seconds,
             Sample((LIMIT_SECONDS,), "s"), peak, Sample((LIMIT_MIB,), "MiB"))  # fmt: skip
    table.rows[f"{RANKS} ranks"] = dict(zip(table.columns, cells, strict=True))
    if spans < SPANS_EACH:
        table.notes.append(
            f"The temporary folder has no space for {SPANS_EACH:,} spans per rank: this run has {spans:,}, but the "
            "limits are those of the larger run. Set TMPDIR to a folder with more space."
        )
    met = seconds.median <= LIMIT_SECONDS and peak.median <= LIMIT_MIB
    table.notes.append(f"{seconds.median:.1f} s and {peak.median:.0f} MiB: {'met' if met else 'not met'}")
    return table
