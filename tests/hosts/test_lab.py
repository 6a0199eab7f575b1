"""Hosts on this machine: their limits, MPI across them, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpctrain.hosts import Description
from hpctrain.lab import machine

ROOT = Path(__file__).resolve().parents[2]
MBIT = 200
LAB = [sys.executable, "-m", "hpctrain", "lab"]
SUM = """
import json, re, socket, sys, time
import numpy as np
from mpi4py import MPI
comm = MPI.COMM_WORLD
node = comm.Split_type(MPI.COMM_TYPE_SHARED)
values = np.ones(1 << 20, np.float32)
comm.Allreduce(MPI.IN_PLACE, values)
comm.Barrier()
began = time.monotonic()
comm.Allreduce(MPI.IN_PLACE, values)
comm.Barrier()
group = re.search(r"hpclab-\\d+", open("/proc/self/cgroup").read())
row = [comm.rank, socket.gethostname(), node.size, float(values[0]), group and group[0], time.monotonic() - began]
rows = comm.gather(row)
if comm.rank == 0:
    json.dump(rows, open(sys.argv[1], "w"))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Two hosts with two places each, half a core and 200 Mbit/s per host."""
    path = tmp_path / "two.toml"
    path.write_text(f"[[hosts]]\ncount = 2\nranks = 2\ncores = 0.5\n[link]\nmbit_per_s = {MBIT}.0\n")
    return path


def lab(*arguments: str, status: int | None = 0, seconds: float = 100.0) -> subprocess.CompletedProcess[str]:
    """Run `hpctrain lab` with a time limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*LAB, *arguments], capture_output=True, text=True, timeout=seconds, env=environment)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def with_ranks(cluster: Path, command: Sequence[str], **more: object) -> subprocess.CompletedProcess[str]:
    return lab("run", "--cluster", str(cluster), "--", *command, **more)  # type: ignore[arg-type]


@contextmanager
def busy(cluster: Path, ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A lab whose ranks have started and would run for a long time."""
    program = f"import time; from mpi4py import MPI; open({str(ready)!r}, 'w'); time.sleep(100)"
    argv = [*LAB, "run", "--cluster", str(cluster), "--", sys.executable, "-c", program]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process


def test_links_and_processors_are_limited_as_described(cluster: Path) -> None:
    shown = lab("check", "--cluster", str(cluster), status=None).stdout
    found = [float(value) for value in re.findall(r": ([\d.e+]+) (?:Mbit/s|cores) \(", shown)]
    assert len(found) == 4, shown
    assert all(0.9 * MBIT < speed < MBIT for speed in found[:2])
    assert all(0.2 < share < 0.525 for share in found[2:]), "less than half a core if this machine is busy"


def test_wrong_link_is_reported(cluster: Path) -> None:
    """A link that is slower than the file says."""
    lab("up", "--cluster", str(cluster))
    try:
        space = f"{machine.PREFIX}2"
        slow = ["tc", "qdisc", "change", "dev", machine.CARD, "root", "handle", "1:", "tbf", "rate", "50mbit"]
        machine._in(space, *slow, "burst", "30000", "latency", "50ms")
        shown = lab("check", "--cluster", str(cluster), status=1).stdout
        assert "WRONG" in next(line for line in shown.splitlines() if "node2 to node1" in line)
        assert "WRONG" not in next(line for line in shown.splitlines() if "node1 to node2" in line)
    finally:
        lab("down")


def test_ranks_of_hosts_sum_over_the_wire(cluster: Path, tmp_path: Path) -> None:
    """Hosts share this machine's memory, which MPI must not notice: 4 MiB from each host to the other take time."""
    program, result = tmp_path / "sum.py", tmp_path / "rows.json"
    program.write_text(SUM)
    with_ranks(cluster, [sys.executable, str(program), str(result)])
    rows = json.loads(result.read_text())
    assert [tuple(row[:5]) for row in rows] == [
        (0, "node1", 2, 16.0, "hpclab-1"), (1, "node1", 2, 16.0, "hpclab-1"),
        (2, "node2", 2, 16.0, "hpclab-2"), (3, "node2", 2, 16.0, "hpclab-2"),
    ]  # fmt: skip
    assert min(seconds for *_, seconds in rows) > 0.9 * 4 * 2**20 * 8 / (MBIT * 1e6)


def test_training_across_hosts_is_the_same_training(tmp_path: Path) -> None:
    cluster = tmp_path / "free.toml"
    cluster.write_text("[[hosts]]\ncount = 2\nranks = 2\n")  # with processors as they are
    job = str(ROOT / "jobs" / "all_reduce.toml")
    keys = ["train={steps = 4, batch_size = 16}", "threads=1", "trace.enabled=false"]
    program = [sys.executable, "-m", "hpctrain", "train", job, *keys]
    losses = []
    for index, more in enumerate((["run", "--cluster", str(cluster), "-n", "2", "--"], None)):
        folder = f"output={tmp_path / str(index)}"
        if more is not None:
            shown = lab(*more, *program, folder).stdout
            assert "2 ranks on 1 node" in shown  # host after host is filled
        else:
            argv = [sys.executable, "-m", "hpctrain", "run", "-n", "2", job, *keys, folder]
            shown = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=True).stdout
        losses.append(re.findall(r"test loss ([\d.]+)", shown))
    assert losses[0] == losses[1]
    shown = with_ranks(cluster, [*program, f"output={tmp_path / 'four'}"]).stdout
    assert "4 ranks on 2 nodes" in shown
    assert re.findall(r"test loss ([\d.]+)", shown)


def test_status_of_a_failed_program_is_passed_on(cluster: Path) -> None:
    done = with_ranks(cluster, [sys.executable, "-c", "from mpi4py import MPI; MPI.COMM_WORLD.Abort(3)"], status=None)
    assert done.returncode != 0


def test_lab_that_is_asked_to_end_removes_its_hosts(cluster: Path, tmp_path: Path) -> None:
    with busy(cluster, tmp_path / "ready") as process:
        refused = lab("down", status=2)
        assert f"is busy on this machine (PID {process.pid})" in refused.stderr
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not machine._spaces()


def test_nothing_is_left_of_a_killed_lab(cluster: Path, tmp_path: Path) -> None:
    with busy(cluster, tmp_path / "ready") as process:
        os.killpg(process.pid, signal.SIGKILL)
    assert machine._spaces()
    assert machine.standing() is None, "its remains must not be taken for a lab"
    shown = lab("down").stdout
    assert "2 hosts" in shown
    assert "process" in shown
    assert not machine._spaces()
    assert not list(Path("/etc/netns").glob(f"{machine.PREFIX}*"))
    assert not machine.HOME.exists()
    assert not [group for folder, _ in machine._group_folders() for group in folder.glob(f"{machine.PREFIX}*")]
    assert lab("down").stdout == "there is no lab on this machine\n"


def test_lab_that_is_up_is_used_and_protected(cluster: Path, tmp_path: Path) -> None:
    lab("up", "--cluster", str(cluster))
    try:
        assert machine.standing() == Description.load(cluster)
        host = Description.load(cluster).each()[0]
        before = machine.bytes_sent(host)
        program, result = tmp_path / "sum.py", tmp_path / "rows.json"
        program.write_text(SUM)
        with_ranks(cluster, [sys.executable, str(program), str(result)])
        assert machine.bytes_sent(host) - before > 2 * 4 * 2**20
        assert machine.standing() is not None
        other = tmp_path / "other.toml"
        other.write_text("[[hosts]]\ncount = 3\n")
        refused = lab("check", "--cluster", str(other), status=2)
        assert "is not the cluster of that file; `hpctrain lab down` removes it" in refused.stderr
    finally:
        lab("down")


def test_bench_on_hosts_names_them_and_leaves_none(cluster: Path, tmp_path: Path) -> None:
    """`limits` is the shortest bench; the link is as slow as the cluster's file says."""
    figures = tmp_path / "figures.json"
    argv = [sys.executable, "-m", "hpctrain", "bench", "limits", "--cluster", str(cluster), "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "hosts: 2, node1 node2" in done.stdout
    row = json.loads(figures.read_text())["limits"]["rows"]["messages between ranks 0 and 2, one at a time"]
    assert 0.5 * MBIT / 8e3 < row["GB/s"]["median"] < 1.05 * MBIT / 8e3
    assert not machine._spaces()
