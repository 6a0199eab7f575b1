"""Stop signals: they set a flag, and neither the launcher nor a stuck rank can block the stop.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 mean the same: finish the step, save, print one line, exit. How much time remains
depends on the launcher. Hydra (MPICH) forwards all but SIGHUP and waits; SIGHUP kills it (see `launcher.lifeline`).
Open MPI's prterun sends SIGTERM 0.25 s after a Ctrl-C and SIGKILL 0.25 s later, and drops whatever the ranks print
meanwhile; no option changes that. So on SIGTERM a rank started by prterun stops it with SIGSTOP, and continues it when
the rank is done. If the rank is silent for 10 s, for whatever reason, a watchdog continues it. The SIGSTOP must be sent
within that quarter of a second, even while the main thread is in C code, so a wake-up pipe and a thread are used
instead of a Python signal handler.

The same thread ends a rank that nothing else would end: one that is stuck in a collective or in user code, where the
main thread never gets to read the flag.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from hpctrain.launcher.facts import OPEN_MPI, STOPPING
from hpctrain.launcher.lifeline import Lifeline
from hpctrain.launcher.processes import name

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A second one of these ends the rank at once. A scheduler's SIGUSR1 is a warning, and may be repeated.
URGENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEATED = 1.0  # seconds within which a launcher may send the same signal twice
LIMIT = 30.0  # seconds: the minimum time that a step gets to end after a stop signal
GRACE = 10.0  # seconds that a launcher is held before the first step has begun
PATIENCE = 1.0  # seconds added to twice the longest step
SAVING = 600.0  # seconds for a checkpoint: the speed of the disk is unknown
LAST_WORDS = 2.0  # seconds that reporting and flushing may take when the rank ends itself
# A separate process, so that it outlives the rank. Its standard input ends when the rank is done or dead.
WATCHDOG = """
import os, select, signal, sys
while select.select([0], [], [], float(sys.argv[2]))[0] and os.read(0, 64):
    pass
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


@dataclass
class Patience:
    """How long to wait for a rank that was asked to stop. All times are seconds on the same clock.

    `seconds`: time for a step to end, if the job sets it. Otherwise it is twice the longest step so far, and the rank
    is ended after `limit` at the earliest.
    """

    seconds: float | None = None
    limit: float = LIMIT
    asked: float | None = None
    _last: float | None = None  # when the latest step ended
    _longest: float = 0.0
    _saving: float | None = None

    def stepped(self, now: float) -> None:
        """Record that a step has ended."""
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last, self._saving = now, None

    def saving(self, now: float) -> None:
        """Record that this rank, or one that it waits for, writes files from now until the next step ends."""
        self._saving = now

    def hopeful(self, now: float) -> bool:
        """Whether the current step can still be expected to end, so that the launcher should wait."""
        if self.asked is None or self._saving is not None:
            return not self.over(now)
        if self.seconds is not None:
            return now - self._since() <= self.seconds
        if self._last is None:
            return now - self.asked <= GRACE
        return now - self._last <= self._usual()

    def over(self, now: float) -> bool:
        """Whether the rank appears to be stuck."""
        if self.asked is None:
            return False
        if self._saving is not None:
            return now - max(self.asked, self._saving) > max(SAVING, self.seconds or 0.0)
        allowed = self.seconds if self.seconds is not None else max(self.limit, self._usual())
        return now - self._since() > allowed

    def _usual(self) -> float:
        return PATIENCE + 2 * self._longest

    def _since(self) -> float:
        return max(self.asked or 0.0, self._last or 0.0)


def prte_parent() -> int | None:
    """The PID of the Open MPI daemon that this process must hold: for the first rank of each node, else None."""
    if os.environ.get(OPEN_MPI.local_rank) != "0":
        return None
    parent = os.getppid()
    return parent if name(parent) in OPEN_MPI.parents else None


class StopSignals:
    """While entered, stop signals set `asked` to the signal's number instead of ending the process.

    A second SIGINT, SIGTERM or SIGHUP ends the rank at once. So does a single one if no step ends for `limit` seconds,
    or for as long as steps are known to take; `seconds` replaces both. The message names `rank`, and `before_end` runs
    in a thread other than the main one. SIGHUP stays ignored if it was (nohup).

    Main thread only; not collective. On exit it restores the previous handlers and releases a held launcher, which
    then kills what is left on the node. Exit when all files are closed, after a barrier, and before MPI_Finalize
    (which needs the launcher and would wait for it).
    """

    def __init__(
        self,
        rank: int = 0,
        seconds: float | None = None,
        limit: float = LIMIT,
        before_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.asked: int = 0
        self.rank = rank
        self._patience = Patience(seconds, limit)
        self._before_end = before_end
        self._launcher = prte_parent()
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._former: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._urgent: float | None = None  # when the first urgent signal came
        stopping = os.environ.get(STOPPING)
        self._stopping = Path(stopping) if stopping else None
        self._unfinished = Path(f"{stopping}.{rank}") if stopping else None

    def __enter__(self) -> Self:
        self._touch(self._unfinished)
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._note)
        self._former_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._lifeline = Lifeline.of_parent()
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
        if self._unfinished is not None:
            self._unfinished.unlink(missing_ok=True)
        self.release()

    def stepped(self) -> None:
        """Record that a step, or a batch of an evaluation, has ended: this rank is not stuck.

        After the first call, a held launcher is released when steps stop ending. The reason: prterun sends SIGTERM not
        only after a Ctrl-C but also when a rank has failed. The other ranks then wait for it forever, and must not
        keep the launcher from ending them.
        """
        self._patience.stepped(time.monotonic())

    def saving(self) -> None:
        """Record that this rank, or one that it waits for, writes files from now until the next step ends."""
        self._patience.saving(time.monotonic())

    @property
    def held(self) -> bool:
        """Whether the launcher is stopped: then output of this rank is lost; use `say`."""
        return self._watchdog is not None

    def say(self, text: str) -> None:
        """Print one line to standard error, bypassing a launcher that no longer forwards output."""
        line = (text.rstrip("\n") + "\n").encode()
        if not self._say_past_launcher(line):
            sys.stderr.write(line.decode())
            sys.stderr.flush()

    def _say_past_launcher(self, line: bytes) -> bool:
        if not self.held or self._launcher is None:
            return False
        with contextlib.suppress(OSError):
            target = os.open(f"/proc/{self._launcher}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
            try:
                os.write(target, line)
            finally:
                os.close(target)
            return True
        return False

    def release(self) -> None:
        """Continue a held launcher (it then kills what is left of the job)."""
        with self._lock:
            watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None and watchdog.stdin is not None:
            with contextlib.suppress(OSError):
                watchdog.stdin.close()
            watchdog.wait()
        if self._lifeline is not None:
            self._lifeline.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number

    def _listen(self) -> None:
        """The thread: handle signals as they arrive, and after the first one, check whether steps still end."""
        while True:
            sources = [self._pipe]
            if self._lifeline is not None and not self.asked:
                sources.append(self._lifeline.death)
            ready, _, _ = select.select(sources, [], [], 0.1 if self.asked else None)
            if self._pipe in ready:
                numbers = os.read(self._pipe, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number in self._former:
                        self._take(number)
            elif ready:
                self._take(signal.SIGHUP)
            if self.asked:
                self._watch()

    def _take(self, number: int) -> None:
        now = time.monotonic()
        self.asked = self.asked or number
        if self._patience.asked is None:
            self._patience.asked = now
        if number == signal.SIGTERM and self._launcher is not None:
            self._hold(self._launcher)
        if number not in URGENT:
            return
        if self._urgent is None:
            self._urgent = now
        elif now - self._urgent >= REPEATED:
            self._end(number, "a second stop signal was received")

    def _watch(self) -> None:
        """Hold the launcher while the step can be expected to end; end this rank when it cannot."""
        now, patience = time.monotonic(), self._patience
        if patience.hopeful(now):
            self._keep_waiting()
        elif self.held:
            self.release()
        if patience.asked is not None and patience.over(now):
            waited = f"{signal.Signals(self.asked).name} was received {now - patience.asked:.0f} s ago"
            self._end(self.asked, f"{waited}, and no step has ended within the time allowed")

    def _keep_waiting(self) -> None:
        watchdog = self._watchdog
        with contextlib.suppress(OSError):
            if watchdog is not None and watchdog.stdin is not None:
                os.write(watchdog.stdin.fileno(), b".")
        self._touch(self._stopping)

    @staticmethod
    def _touch(path: Path | None) -> None:
        with contextlib.suppress(OSError):
            if path is not None:
                path.touch()

    def _end(self, number: int, why: str) -> None:
        """End this process. Its launcher ends the others; ranks that are also stuck end themselves."""
        line = f"hpctrain: rank {self.rank} exits: {why}; nothing was saved since the last checkpoint\n".encode()

        def last_words() -> None:
            if not self._say_past_launcher(line):
                os.write(2, line)  # sys.stderr may be locked by the main thread
            self._before_end()

        if self.rank > 0:
            time.sleep(0.5)  # rank 0 reports for all ranks, where the launcher ends the others
        words = threading.Thread(target=last_words, daemon=True)
        words.start()
        words.join(LAST_WORDS)
        # By a signal, not an exit status: MPICH's launcher misses some ranks that exit, and the others wait forever.
        ctypes.CDLL(None).signal(number, 0)  # the default; Python's own signal() works in the main thread only
        os.kill(os.getpid(), number)
        time.sleep(LAST_WORDS)
        os._exit(128 + number)

    def _hold(self, launcher: int) -> None:
        with self._lock:
            if self._watchdog is not None or os.getppid() != launcher or _has_lost_a_rank(launcher):
                return
            os.kill(launcher, signal.SIGSTOP)
            argv = [sys.executable, "-S", "-E", "-c", WATCHDOG, str(launcher), str(GRACE)]
            self._watchdog = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)


def _has_lost_a_rank(launcher: int) -> bool:
    """Whether a rank of that daemon has ended: then it is about to kill the others, and must be allowed to."""
    expected = int(os.environ.get(OPEN_MPI.local_size, "0"))
    living = 0
    sign = f"{OPEN_MPI.local_rank}=".encode()
    # Without psutil, which reads a file of every process on the machine. After each file this thread waits for the main
    # one, so the quarter of a second could pass.
    try:
        for task in os.listdir(f"/proc/{launcher}/task"):
            with open(f"/proc/{launcher}/task/{task}/children") as file:
                children = file.read().split()
            for child in children:
                with contextlib.suppress(OSError), open(f"/proc/{child}/environ", "rb") as file:
                    living += sign in file.read()  # empty for a zombie
    except OSError:  # some kernels do not list children
        return False
    return living < expected
