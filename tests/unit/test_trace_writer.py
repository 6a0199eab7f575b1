"""The writer: flushed data survives kill -9, and a full disk does not end training."""

import os
import random
import subprocess
import sys
import time
from collections import namedtuple

import h5py
import numpy as np
import pytest

from hpctrain.errors import TraceError
from hpctrain.trace import (
    SCHEMA_VERSION,
    Kind,
    Recorder,
    Sampler,
    TraceWriter,
    link_ranks,
    next_attempt,
    open_run,
    trace_path,
)
from tests.marks import mostly_slow

ATTRIBUTES = {
    "rank": 0,
    "size": 1,
    "host": "häst",
    "node": 0,
    "role": "worker",
    "device": "cpu",
    "job": "",
    "attempt": 1,
}

# Writes spans as fast as it can, flushes after each block, and prints how many spans the file must now hold.
PROGRAM = """
import os, random, sys
from hpctrain.trace import Recorder, TraceWriter, trace_path
from hpctrain.trace.events import PlainEvent
recorder, n = Recorder(), 0
writer = TraceWriter(trace_path(sys.argv[1], 0), recorder, {"rank": 0, "size": 1, "job": "x" * 3000}, 0.0)
while True:
    for _ in range(random.randint(1, 2000)):
        recorder.step = n
        recorder.open("send", 10 * n + 1, n)
        recorder.close(10 * n + 5)
        n += 1
    recorder.step_done(0, 1.0, 1, 0.1)
    recorder.event(PlainEvent("mark", str(n)))
    writer.maybe_flush(recorder.now())
    os.write(1, b"%d\\n" % n)
"""


def write(folder, rank=0, spans=3, close=True, **attributes):
    recorder = Recorder()
    writer = TraceWriter(trace_path(folder, rank), recorder, {**ATTRIBUTES, "rank": rank, **attributes})
    for _ in range(spans):
        recorder.open("forward", recorder.now())
        recorder.close(recorder.now())
    if close:
        writer.close()
    return writer


@pytest.mark.parametrize("seed", mostly_slow(range(6), (0, 1)))
def test_rank_killed_at_any_moment_leaves_a_readable_file(tmp_path, seed):
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        printed = [child.stdout.readline()]  # the file exists and has been flushed once
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        child.kill()
        printed += child.stdout.read().split(b"\n")[:-1]  # the last line may have been cut by the kill
    finally:
        child.kill()
        child.wait(timeout=10)
    flushed = int(printed[-1])
    run = open_run(tmp_path)
    spans = run.spans(kind="send")
    steps = np.arange(len(spans))
    assert len(spans) >= flushed
    assert flushed > 0
    assert (spans["step"] == steps).all()
    assert (spans["start_ns"] == 10 * steps + 1).all()
    assert (spans["bytes"] == steps).all()
    assert len(run.steps()) >= len(printed)
    assert run.events()["text"].iloc[len(printed) - 1] == printed[-1].decode().strip()
    assert [note for note in run.notes if "still running, or killed" in note]


def test_file_can_be_read_while_it_grows(tmp_path):
    writer = write(tmp_path, spans=5, close=False)
    assert len(open_run(tmp_path).spans(kind="forward")) == 0
    writer.flush()
    assert len(open_run(tmp_path).spans(kind="forward")) == 5
    writer.flush()
    assert open_run(tmp_path).spans(kind="trace")["rank"].tolist() == [0]
    writer.close()
    assert len(open_run(tmp_path).spans(kind="trace")) == 3


def test_file_gets_its_name_only_once_readable(tmp_path):
    write(tmp_path, close=False)
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["rank_00000.h5"]


def test_maybe_flush_waits_for_its_interval(tmp_path):
    now = [0]
    recorder = Recorder(lambda: now[0])
    writer = TraceWriter(trace_path(tmp_path, 0), recorder, ATTRIBUTES, flush_seconds=2.0)
    assert not writer.maybe_flush(1_999_999_999)
    now[0] = 2_000_000_000
    assert writer.maybe_flush(now[0])
    assert not writer.maybe_flush(3_999_999_999)
    assert writer.maybe_flush(4_000_000_000)
    writer.close()


def test_flush_is_a_span_and_cuts_open_spans(tmp_path):
    recorder = Recorder()
    writer = TraceWriter(trace_path(tmp_path, 0), recorder, ATTRIBUTES)
    recorder.open("evaluate", recorder.now())
    writer.flush()
    recorder.close(recorder.now())
    writer.close()
    kinds = open_run(tmp_path).spans()[["kind", "piece"]].to_numpy().tolist()
    assert kinds == [["evaluate", 0], ["trace", 0], ["evaluate", 1], ["trace", 0]]


def test_attributes_round_trip(tmp_path):
    write(tmp_path, job="name = 'x'\n" * 9000, torch="2.13.0", empty="")
    found = open_run(tmp_path).attributes(0)
    assert found["host"] == "häst"
    assert found["job"] == "name = 'x'\n" * 9000
    assert (found["empty"], found["torch"], found["size"], found["schema_version"]) == ("", "2.13.0", 1, SCHEMA_VERSION)
    assert abs(found["unix_ns"] - time.time_ns()) < 60e9


def test_existing_trace_is_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(TraceError, match="already exists"):
        write(tmp_path)
    assert len(open_run(tmp_path).spans(kind="forward")) == 3


def test_unwritable_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"rank_00000.h5: the trace cannot be written here \(Not a directory\)"):
        write(tmp_path / "file")


def test_full_disk_ends_the_trace_but_not_the_run(tmp_path):
    """/dev/full under the file's descriptor makes the real HDF5 fail; it used to crash at exit."""
    program = f"""
import os
from hpctrain.trace import Recorder, TraceWriter, trace_path
recorder = Recorder()
writer = TraceWriter(trace_path({str(tmp_path)!r}, 0), recorder, {{"rank": 0, "size": 1}})
def spans():
    for _ in range(9000):
        recorder.open("forward", recorder.now())
        recorder.close(recorder.now())
spans()
writer.flush()
os.dup2(os.open("/dev/full", os.O_RDWR), writer._file.id.get_vfd_handle())
for _ in range(3):
    spans()
    writer.flush()
assert not recorder.drain()["spans"].size > 1, "memory must not grow"
writer.close()
print("trained on", writer.stopped is not None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "trained on True\n"), done.stderr
    assert done.stderr.count("rank 0: the trace ") == done.stderr.count("ends here (No space left on device)") == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(open_run(tmp_path).spans(kind="forward")) == 9000


def test_linked_ranks_open_from_one_file(tmp_path):
    for rank in range(3):
        write(tmp_path, rank=rank, spans=rank + 1, size=3)
    write(tmp_path / "b", spans=9)
    os.rename(trace_path(tmp_path / "b", 0), trace_path(tmp_path, 0, 2))
    path = link_ranks(tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    with h5py.File(moved / path.name, "r", libver="latest", swmr=True) as file:
        sizes = {name: int((file[name]["spans"]["kind"] == Kind.FORWARD).sum()) for name in file}
    assert sizes == {"rank_00000": 1, "rank_00000.2": 9, "rank_00001": 2, "rank_00002": 3}
    assert next_attempt(moved) == 3
    assert next_attempt(tmp_path / "new") == 1


def test_resources_are_sampled_in_a_thread(tmp_path):
    recorder = Recorder()
    sampler = Sampler(recorder, 0.01)
    sampler.start()
    end = time.monotonic() + 10
    rows = recorder.drain()["resources"]
    while len(rows) < 3 and time.monotonic() < end:
        time.sleep(0.02)
        rows = np.concatenate([rows, recorder.drain()["resources"]])
    sampler.stop()
    assert len(rows) >= 3
    assert (rows["resident"] > 1 << 20).all()
    assert (rows["cpu"] >= 0).all()
    assert (np.diff(rows["t_ns"]) > 0).all()
    assert rows["gpu"].tolist() == [-1.0] * len(rows)
    recorder.drain()
    time.sleep(0.05)
    assert recorder.drain()["resources"].size == 0


def test_network_bytes_exclude_loopback(monkeypatch):
    card = namedtuple("card", "bytes_recv bytes_sent")
    cards = {"lo": card(1000, 1000), "eth0": card(5, 7), "ib0": card(10, 20)}
    monkeypatch.setattr("psutil.net_io_counters", lambda **_: cards)
    recorder = Recorder()
    sampler = Sampler(recorder, 60.0)
    sampler.start()
    sampler.stop()
    assert recorder.drain()["resources"][0][["net_in", "net_out"]].tolist() == (15, 27)


def test_sampler_queries_the_gpu_driver(monkeypatch):
    class Nvml:
        NVMLError = OSError

        @staticmethod
        def nvmlInit():
            return None

        @staticmethod
        def nvmlDeviceGetHandleByUUID(uuid):
            assert uuid == "GPU-1"
            return "handle"

        @staticmethod
        def nvmlDeviceGetUtilizationRates(handle):
            raise OSError("not on a slice")

        @staticmethod
        def nvmlDeviceGetMemoryInfo(handle):
            return type("Memory", (), {"used": 7 << 30})

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    recorder = Recorder()
    sampler = Sampler(recorder, 60.0, gpu="GPU-1")
    sampler.start()
    sampler.stop()
    rows = recorder.drain()["resources"]
    assert rows[["gpu", "gpu_memory"]].tolist() == [(-1.0, 7 << 30)] * len(rows)
    assert len(rows) >= 1


def test_process_ends_while_its_sampler_runs():
    program = "from hpctrain.trace import *; Sampler(Recorder(), 60.0).start(); print('end')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@pytest.mark.parametrize("error", [OverflowError("too large"), MemoryError(), KeyError("spans"), RuntimeError("")])
def test_no_tracing_error_ends_a_run(tmp_path, capsys, monkeypatch, error):
    """On any exception the trace stops with one message, and everything flushed before is kept."""
    writer = write(tmp_path, rank=3, close=False, size=4)
    writer.flush()

    def fail():
        raise error

    monkeypatch.setattr(writer, "recorder", Faulty(writer.recorder, fail))
    writer.flush()
    writer.flush()
    writer.close()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and type(error).__name__ in printed.replace("RuntimeError", "RuntimeError: ")
    assert printed.startswith("hpctrain: warning: rank 3: the trace ") and "from now on is not traced" in printed
    assert writer.stopped is not None and writer.stopped in printed
    assert len(open_run(tmp_path).spans(kind="forward")) == 3


class Faulty:
    """A recorder with another `drain`."""

    def __init__(self, recorder, drain):
        self._recorder, self.drain = recorder, drain

    def __getattr__(self, name):
        return getattr(self._recorder, name)
