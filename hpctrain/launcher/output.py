"""The output of ranks, passed on without what their launcher only repeats."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from typing import IO

from hpctrain.launcher.noise import NoiseFilter


class Pump(threading.Thread):
    """Passes lines on as they come, and an unfinished line as soon as the source pauses. `passed`: whether any."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self.noise = NoiseFilter()
        self.passed = False
        self._source, self._target = source, target

    def run(self) -> None:
        """Until the source ends."""
        noise, rest = self.noise, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            while True:
                if not selector.select(0.1):
                    self._write(noise.flush() + rest.strip(b"\0"))
                    rest = b""
                    selector.select()
                data = os.read(self._source.fileno(), 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                self._write(b"".join(noise.feed(line + b"\n") for line in lines))
        self._write(noise.flush() + rest.strip(b"\0"))

    def _write(self, data: bytes) -> None:
        self.passed = self.passed or bool(data.strip())
        with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full: the ranks go on
            while data:
                data = data[os.write(self._target, data) :]
