"""Asked to stop: signals become a flag, and the launcher is kept from killing before the flag is heeded.

SIGINT, SIGTERM and SIGUSR1 mean the same: finish the step, save, say one line, leave. How much time there is
depends on the launcher. Hydra (MPICH) forwards the signal and waits. Open MPI's prterun sends SIGTERM 0.25 s
after a Ctrl-C and SIGKILL 0.25 s later, and drops whatever the ranks print meanwhile; no option changes that.
So on SIGTERM a rank below prterun stops it with SIGSTOP, and continues it when the rank is done (a watchdog does
so after `limit` seconds, whatever becomes of the rank). It has to happen within that quarter of a second, also
while the main thread sits in C code, hence a wake-up pipe and a thread instead of a Python signal handler.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 1.0  # seconds beyond twice the longest step
PRTE_NAMES = {"mpirun", "mpiexec", "prterun", "prte", "prted"}
# A process of its own, so that it outlives the rank. Its standard input ends when the rank is done, or gone.
WATCHDOG = """
import os, select, signal, sys
select.select([0], [], [], float(sys.argv[2]))
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


def prte_parent() -> int | None:
    """The PID of the Open MPI daemon that this process is to hold: for the first rank of each node, else None."""
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") != "0":
        return None
    parent = os.getppid()
    return parent if _name(parent) in PRTE_NAMES else None


class StopSignals:
    """While entered, stop signals set `asked` to the signal's number instead of ending the process.

    Main thread only; not collective. Leaving it puts the former handlers back and lets a held launcher go on,
    which then kills what is left on the node: leave it when all files are closed, after a barrier, and before
    MPI_Finalize (which needs the launcher and would wait for it).
    """

    def __init__(self, limit: float = 10.0) -> None:
        self.asked: int = 0
        self.limit = limit
        self._launcher = prte_parent()
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._former: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._heeded = False
        self._last = 0.0  # when the newest step ended
        self._longest = 0.0

    def __enter__(self) -> Self:
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        self._former_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._former_fd)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the listener
        self._thread.join()
        os.close(self._pipe)
        self.release()

    def stepped(self) -> None:
        """A step has ended. Once this is called, a held launcher is let go when steps no longer come.

        For prterun sends SIGTERM not only after a Ctrl-C but also when a rank has failed; then the others wait
        for it for ever, and must not keep the launcher from ending them.
        """
        now = time.monotonic()
        if self._last:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def heed(self) -> None:
        """All ranks have agreed to stop: from here on saving may take up to `limit`."""
        self._heeded = True

    @property
    def held(self) -> bool:
        """Whether the launcher stands still: what this rank prints is lost, use `say`."""
        return self._watchdog is not None

    def say(self, text: str) -> None:
        """Print one line to standard error, past a launcher that no longer passes output on."""
        line = (text.rstrip("\n") + "\n").encode()
        if self.held and self._launcher is not None:
            with contextlib.suppress(OSError):
                target = os.open(f"/proc/{self._launcher}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
                try:
                    os.write(target, line)
                finally:
                    os.close(target)
                return
        sys.stderr.write(line.decode())
        sys.stderr.flush()

    def release(self) -> None:
        """Let a held launcher go on (it then kills what is left of the job)."""
        with self._lock:
            watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None and watchdog.stdin is not None:
            watchdog.stdin.close()
            watchdog.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number

    def _listen(self) -> None:
        while numbers := os.read(self._pipe, 64):
            for number in numbers:
                if number in SIGNALS:
                    self.asked = self.asked or number
                if number == signal.SIGTERM and self._launcher is not None:
                    self._hold(self._launcher)

    def _hold(self, launcher: int) -> None:
        with self._lock:
            if self._watchdog is not None or os.getppid() != launcher or _has_lost_a_rank(launcher):
                return
            os.kill(launcher, signal.SIGSTOP)
            argv = [sys.executable, "-S", "-E", "-c", WATCHDOG, str(launcher), str(self.limit)]
            self._watchdog = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        threading.Thread(target=self._guard, name="stop-signals-guard", daemon=True).start()

    def _guard(self) -> None:
        """Let the launcher go if no step ends any more."""
        while self.held and not self._heeded:
            if self._last and time.monotonic() - self._last > PATIENCE + 2 * self._longest:
                self.release()
            time.sleep(0.05)


def _has_lost_a_rank(launcher: int) -> bool:
    """Whether a rank below that daemon has ended: then it is about to kill the others, and shall."""
    wanted = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0"))
    living = 0
    try:
        for task in os.listdir(f"/proc/{launcher}/task"):
            with open(f"/proc/{launcher}/task/{task}/children") as file:
                children = file.read().split()
            for child in children:
                with contextlib.suppress(OSError), open(f"/proc/{child}/environ", "rb") as file:
                    living += b"OMPI_COMM_WORLD_LOCAL_RANK=" in file.read()  # of a zombie it is empty
    except OSError:  # not every kernel lists children
        return False
    return living < wanted


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
