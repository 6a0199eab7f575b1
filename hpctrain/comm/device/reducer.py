"""All-reduces of device buffers that run in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from hpctrain.comm.base import Communicator, Request, Thread


class Reducer:
    """Runs started all-reduces one after the other in a thread, on `comm`, which nothing else uses."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._jobs: deque[ReduceInThread] = deque()
        self._lock = threading.Lock()
        self._running = False
        self.thread: Thread | None = None

    def start(self, reduce: Callable[[], None]) -> Request:
        """`reduce`: a blocking all-reduce over the communicator's ranks."""
        job = ReduceInThread(self, reduce)
        with self._lock:
            self._jobs.append(job)
            if not self._running:
                self._running = True
                self.thread = self.comm.spawn(self._work)
        return job

    def join(self) -> None:
        """Wait until the thread has run what was started."""
        if self.thread is not None:
            self.thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    return
                job = self._jobs.popleft()
            job.run()


class ReduceInThread(Request):
    """A started all-reduce of a device buffer."""

    def __init__(self, reducer: Reducer, reduce: Callable[[], None]) -> None:
        self._reducer, self._reduce = reducer, reduce
        self._done = False

    def run(self) -> None:
        self._reduce()
        self._done = True

    def pending(self) -> None:
        return None

    def test(self) -> bool:
        return self._done

    def wait(self) -> int:
        with self._reducer.comm.span("wait"):
            while not self._done:
                assert self._reducer.thread is not None
                self._reducer.thread.join()
        return 0


class Done(Request):
    """A request with nothing left to do."""

    def test(self) -> bool:
        return True

    def wait(self) -> int:
        return 0


NOTHING = Done()  # an all-reduce of a single rank
