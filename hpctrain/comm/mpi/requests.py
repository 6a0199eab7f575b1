"""Started operations of real ranks, and how to wait for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hpctrain.comm.base import Buffer, Request
from hpctrain.comm.mpi.start import MPI
from hpctrain.comm.waiting import BETWEEN, NAP, SHORT, nap
from hpctrain.trace.recorder import Recorder

LOOKS = 16  # polls between naps: in each, MPICH moves only one piece (about 64 KiB) of a long message
QUICK = 5e-6  # seconds; a poll that moves a piece takes longer than twice this, or twice the quickest poll so far


class Waiting:
    """How to wait until a condition is true: poll often at first, then nap or continue polling.

    With `naps`, a waiting rank leaves its core to ranks that compute; without, latency is lowest. Naps grow: each poll
    takes a core's time, and the interpreter from other threads. `patient`: naps are long from the start.
    """

    def __init__(self, naps: bool, patient: bool = False) -> None:
        self.naps = naps
        self._shortest = BETWEEN if patient else NAP
        self._eager = 20 if naps else 1000

    def until(self, ready: Callable[[], bool], idle: bool = False) -> None:
        """Wait until `ready`; `idle`: no long message moves meanwhile."""
        for _ in range(self._eager):
            if ready():
                return
        if not self.naps:
            while not ready():
                os.sched_yield()
            return
        looks = 1 if idle else LOOKS
        began, quick = time.monotonic(), QUICK
        while True:
            time.sleep(nap(time.monotonic() - began, idle, self._shortest))
            for _ in range(looks):
                start = time.perf_counter()
                if ready():
                    return
                taken = time.perf_counter() - start
                quick = min(quick, taken)
                if taken < 2 * quick:  # nothing moved
                    break

    def settle(self, request: MPI.Request, idle: bool = False) -> None:
        """Wait until that MPI operation is over."""
        if self.naps:
            self.until(request.Test, idle)
        else:
            request.Wait()


class MpiRequest(Request):
    """A started MPI operation. `_end` is called once, by whichever call first finds it over."""

    __slots__ = ("_done", "_recorder", "_request", "_waiting", "id")

    def __init__(self, recorder: Recorder, waiting: Waiting, request: MPI.Request, id: int) -> None:
        self._recorder, self._waiting, self._request, self.id = recorder, waiting, request, id
        self._done = False

    def over(self) -> bool:
        return self._done or bool(self._request.Test())

    def test(self) -> bool:
        if not self._done and self.over():
            self._end()
            self._done = True
        return self._done

    @property
    def short(self) -> bool:
        """Whether it is a message that needs no more polling once it is there."""
        return False

    def _end(self) -> None:
        """Remaining work after MPI has completed the operation."""


class MpiSend(MpiRequest):
    """A started send. Its bytes are traced when it starts; the wait for its end is a second span, without bytes."""

    __slots__ = ("_peer",)

    def __init__(self, recorder: Recorder, waiting: Waiting, request: MPI.Request, peer: int, id: int) -> None:
        super().__init__(recorder, waiting, request, id)
        self._peer = peer

    def wait(self) -> int:
        if not self.test():
            with self._recorder.span("send", 0, self._peer, self.id):
                self._waiting.settle(self._request)
            self._done = True
        return 0


class MpiRecv(MpiRequest):
    """A started receive. Traced at its end; length zero if nothing waited. `peer`: the sender's rank in the run."""

    __slots__ = ("_buffer", "_elements", "_found", "_peer")

    def __init__(
        self, recorder: Recorder, waiting: Waiting, request: MPI.Request, buffer: Buffer, peer: int, id: int
    ) -> None:
        super().__init__(recorder, waiting, request, id)
        self._buffer, self._peer, self._elements = buffer, peer, 0
        self._found: MPI.Status | None = None

    def over(self) -> bool:
        if self._found is None and not self._done:
            found = MPI.Status()
            if not self._request.Test(found):
                return False
            self._found = found
        return True

    def wait(self) -> int:
        if not self.test():
            with self._recorder.span("recv", id=self.id):
                if self._waiting.naps:
                    self._waiting.until(self.over, self.short)
                else:
                    self._found = MPI.Status()
                    self._request.Wait(self._found)
                self._received()
            self._done = True
        return self._elements

    @property
    def short(self) -> bool:
        return bool(self._buffer.nbytes <= SHORT)

    def explain(self) -> None:
        self._recorder.learn(0, self._peer, self.id)

    def _end(self) -> None:
        with self._recorder.span("recv", id=self.id):
            self._received()

    def _received(self) -> None:
        assert self._found is not None
        nbytes = self._found.Get_count(MPI.BYTE)
        self._elements = nbytes // self._buffer.itemsize
        self._recorder.learn(nbytes, self._peer, self.id)

    def cancel(self) -> None:
        if not self._done:
            self._request.Cancel()
            self._request.Wait()
            self._done = True


class MpiReduce(MpiRequest):
    """A started all-reduce. Traced like a send: its bytes when it starts, the wait for its end in a second span."""

    __slots__ = ("_buffer", "_wide")

    def __init__(
        self, recorder: Recorder, waiting: Waiting, request: MPI.Request, buffer: Buffer, wide: Buffer, id: int
    ) -> None:
        super().__init__(recorder, waiting, request, id)
        self._buffer, self._wide = buffer, wide

    def wait(self) -> int:
        if not self.test():
            with self._recorder.span("reduce", id=self.id):
                self._waiting.settle(self._request)
            self._end()
            self._done = True
        return 0

    def _end(self) -> None:
        if self._wide is not self._buffer:
            self._buffer[...] = self._wide
