"""Times of spans on a real device. NOT YET RUN: no GPU was available when it was written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from hpctrain.trace import Kind, Recorder, open_run
from hpctrain.trace.device import TIMED, time_on_cuda
from tests.conftest import Mpirun

CYCLES = 50_000_000  # of a kernel that does nothing: tens of milliseconds


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(time.monotonic_ns)


def test_device_times_cover_the_work_that_the_host_only_queues(recorder: Recorder) -> None:
    times = time_on_cuda(recorder)
    recorder.step = 3
    with recorder.span("forward"):
        torch.cuda._sleep(CYCLES)
    with recorder.span("backward"):
        torch.cuda._sleep(2 * CYCLES)
    times.read()
    assert not len(recorder.drain()["device"])  # the device is still at work, and nothing has waited for it
    times.settle()
    rows = recorder.drain()
    assert rows["device"][["step", "kind"]].tolist() == [(3, Kind.FORWARD), (3, Kind.BACKWARD)]
    assert not len(rows["events"])
    forward, backward = (rows["device"]["end_ns"] - rows["device"]["start_ns"]).tolist()
    assert 1.5 < backward / forward < 2.5


def test_rows_are_in_order_and_lie_where_the_host_knows_that_they_must(recorder: Recorder) -> None:
    times = time_on_cuda(recorder)
    for step in range(50):
        recorder.step = step
        for kind in ("forward", "backward", "update"):
            with recorder.span(kind):
                torch.cuda._sleep(CYCLES // 50)
    times.settle()
    after, rows = time.monotonic_ns(), recorder.drain()
    device, spans = rows["device"], rows["spans"]
    assert device[["step", "kind"]].tolist() == spans[["step", "kind"]].tolist()
    assert not len(rows["events"])
    error = device["error_ns"]
    assert (device["start_ns"] + error >= spans["start_ns"]).all()  # not before the host has asked for it
    assert (device["end_ns"] - error <= after).all()
    assert (device["start_ns"][1:] + 2000 >= device["end_ns"][:-1]).all()  # one after the other, to CUDA's resolution
    print(f"error {error.min() / 1e3:.1f} to {error.max() / 1e3:.1f} us")


def test_a_run_on_a_gpu_has_device_times_of_every_step(mpirun: Mpirun, tmp_path: Path) -> None:
    program = "import sys; from hpctrain.cli import main; sys.exit(main(sys.argv[1:]))"
    keys = ["device=cuda", "train.epochs=1", f"output={tmp_path}"]
    job = Path(__file__).resolve().parents[2] / "jobs" / "all_reduce.toml"
    mpirun(2, program, "train", str(job), *keys, timeout=110)
    (folder,) = tmp_path.glob("all_reduce-*")
    run = open_run(folder)  # blocks: frames need pandas, which a bare machine lacks
    steps = {rank: len(rows) for rank, _, rows in run.blocks("steps")}
    assert len(steps) == 2
    for rank, _, rows in run.blocks("device"):
        counts = [int((rows["kind"] == kind).sum()) for kind in TIMED]
        assert counts == [steps.pop(rank)] * len(TIMED)
        took = (rows["end_ns"] - rows["start_ns"]) / 1e6
        print(f"rank {rank}:", {kind.name.lower(): f"{took[rows['kind'] == kind].mean():.3f} ms" for kind in TIMED})
    assert not steps
    assert not run.notes
