"""`hpctrain watch` beside a real run: it follows it to the end, detects a killed run, and never disturbs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

from hpctrain.trace import open_run

pytestmark = pytest.mark.launch

WATCH = """
import signal, sys
from pathlib import Path
from hpctrain.views.watch import watch
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
sys.exit(watch(Path(sys.argv[1]), every=0.3))
"""
JOB = """
name = "watched"
model = "convnet"
data = "digits"
trace.flush_seconds = 0.2
[train]
steps = {steps}
batch_size = 8
[strategy]
name = "parameter_server"
mode = "async"
[debug.slow]
1 = 3.0
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[str], Path]]]:
    """start(steps): a run on 3 ranks in the background, and its folder once it exists."""
    runs = []

    def begin(steps: int) -> tuple[subprocess.Popen[str], Path]:
        (tmp_path / "job.toml").write_text(JOB.format(steps=steps))
        job = [str(tmp_path / "job.toml"), f"output={tmp_path}/runs"]
        command = [sys.executable, "-m", "hpctrain", "run", "-n", "3", *job]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        runs.append(run)
        deadline = time.monotonic() + 60
        while not (found := list(tmp_path.glob("runs/*/job.toml"))):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return run, found[0].parent

    yield begin
    for run in runs:
        if run.poll() is None:
            run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.any_mpi
def test_watch_follows_a_run_from_start_to_end(start):
    run, folder = start(400)
    watching = subprocess.run([sys.executable, "-c", WATCH, str(folder)], capture_output=True, text=True, timeout=100)
    output, _ = run.communicate(timeout=20)
    assert (run.returncode, watching.returncode) == (0, 0), watching.stderr
    lines = watching.stdout.splitlines()
    assert any("running" in line and "parameter_server (async)" in line and "samples/s" in line for line in lines)
    assert any("left" in line for line in lines)
    assert any(line.startswith("the run finished at") for line in lines)
    assert any(line.split()[:2] == ["1", "worker"] and "straggler" in line for line in lines)
    assert any(line.split()[:2] == ["2", "server"] for line in lines)
    assert "test accuracy" in output
    assert open_run(folder).notes == []


@contextmanager
def watched(folder: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """(a process that watches the run and has shown the time left, its output lines)."""
    watching = subprocess.Popen([sys.executable, "-u", "-c", WATCH, str(folder)], stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    try:
        assert any("left" in line for line in watching.stdout)
        yield watching, watching.stdout
    finally:
        watching.kill()
        watching.communicate()


@pytest.mark.any_mpi
@pytest.mark.slow
def test_ctrl_c_does_not_affect_the_run_and_watch_reports_a_killed_run(start):
    run, folder = start(100_000)
    with watched(folder) as (watching, _):
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
        assert run.poll() is None
    with watched(folder) as (watching, lines):
        ranks = [child for child in psutil.Process(run.pid).children(recursive=True) if "train" in child.cmdline()]
        ranks[-1].kill()  # the launcher then ends the remaining ranks
        assert any("nothing written since" in line for line in lines)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
