"""Information about other processes, including ended ones."""

from __future__ import annotations

import os
import subprocess
import time

from hpctrain.launcher import processes


def test_process_is_known_until_its_parent_reaps_it() -> None:
    with subprocess.Popen(["sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        pid, pidfd = process.pid, os.pidfd_open(process.pid)
        assert processes.living(pid)
        assert processes.exit_code(pidfd, pid) is None
        assert (processes.name(pid), processes.parent(pid)) == ("sh", os.getpid())
        process.stdin.close()
        deadline = time.monotonic() + 20
        while processes.living(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert processes.exit_code(pidfd, pid) == 3 << 8
    assert (processes.name(pid), processes.parent(pid)) == ("", 0)
    assert processes.exit_code(pidfd, pid) in (3 << 8, None)  # None before Linux 6.15
    os.close(pidfd)
    assert not processes.living(pid)
