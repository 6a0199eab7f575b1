"""A lifeline keeps open the connections of a process that dies."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

from hpctrain.launcher.lifeline import Lifeline


def test_connections_stay_open_until_the_lifeline_closes() -> None:
    end, other = os.pipe()
    argv = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=[other]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.close(other)
        line = Lifeline.of(process.pid)
        if line is None:
            process.kill()
            pytest.skip("this system does not let a process copy another's files")
        assert not select.select([line.death], [], [], 0)[0]
        process.kill()
        assert select.select([line.death], [], [], 10)[0]
    assert not select.select([end], [], [], 0.1)[0], "the other end of the pipe is closed"
    line.close()
    assert os.read(end, 1) == b""
    os.close(end)
    line.close()


def test_only_the_first_rank_below_an_mpiexec_has_a_lifeline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Lifeline.of_parent() is None
    monkeypatch.setenv("MPI_LOCALRANKID", "0")  # left over: our parent is not a proxy
    assert Lifeline.of_parent() is None
    assert Lifeline.of(2**22 + 1) is None
