"""Information about other processes, including ended ones."""

from __future__ import annotations

import os
import subprocess
import time

from hpctrain.launcher import processes


def test_process_is_known_until_its_parent_reaps_it() -> None:
    with subprocess.Popen(["sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        pid = process.pid
        assert processes.living(pid)
        assert processes.exit_code(pid) is None
        assert (processes.name(pid), processes.parent(pid)) == ("sh", os.getpid())
        process.stdin.close()
        deadline = time.monotonic() + 20
        while processes.living(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert processes.exit_code(pid) == 3 << 8
    assert (processes.name(pid), processes.parent(pid), processes.exit_code(pid)) == ("", 0, None)
    assert not processes.living(pid)
