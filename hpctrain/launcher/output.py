"""Forwards the output of ranks, without their launcher's messages about failed ranks."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from typing import IO

from hpctrain.launcher.noise import NoiseFilter


class Pump(threading.Thread):
    """Forwards lines as they arrive, and a partial line when the source pauses. `passed`: whether it forwarded any."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self.noise = NoiseFilter()
        self.passed = False
        self._source, self._target = source, target

    def run(self) -> None:
        """Forward until the source ends."""
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
        with contextlib.suppress(OSError):  # the reader is gone or the disk is full: the ranks continue
            while data:
                data = data[os.write(self._target, data) :]
