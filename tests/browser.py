"""A page in headless Chromium, driven by its DevTools protocol over a pipe. No library, no port.

    with Page(path) as page:
        page.until("document.title != ''")
        page.wheel(500, 300, -240)
        assert not page.complaints

`complaints`: console errors and exceptions. `requests`: the requested addresses, except the page's own (file:) and
data: aside.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)
MISSING = "no Chromium here (chromium, chromium-browser or google-chrome in PATH): pages cannot be opened"
LIMIT_S = 60.0  # for an answer from Chromium
_OWN = ("file:", "data:", "blob:")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
          "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")  # fmt: skip


class Page:
    """The page `path`, opened at `width` x `height` CSS pixels. Use it as a context manager."""

    def __init__(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number, self._unread, self._session = 0, b"", ""
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._start(f"--window-size={width},{height}")
        try:
            self._open(Path(path), width, height, dark)
        except BaseException:
            self.close()
            raise

    def _start(self, size: str) -> None:
        # Chromium reads commands from descriptor 3 and answers on 4; the shell moves the pipes there.
        (read_theirs, write), (read, write_theirs) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_theirs, write_theirs)]
        os.close(read_theirs)
        os.close(write_theirs)
        script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(CHROMIUM), *_FLAGS, size, f"--user-data-dir={self._home.name}"],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in high:
            os.close(end)
        self._read, self._write = read, write

    def _open(self, path: Path, width: int, height: int, dark: bool) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState == 'complete'")

    # -- the protocol --------------------------------------------------------------------------------------
    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a DevTools command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + LIMIT_S
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer within {LIMIT_S} s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("Chromium ended")
            self._unread += data
        line, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not about["request"]["url"].startswith(_OWN):
            self.requests.append(about["request"]["url"])

    # -- what a reader of the page does -------------------------------------------------------------------------------
    def run(self, script: str) -> Any:
        """The value of a JavaScript expression (of a promise: what it resolves to)."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "exception"))
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} did not become true within {seconds} s; {self.complaints}")
            time.sleep(0.02)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """x, y, width, height of an element in the window, scrolled into view."""
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        script = "(b => [b.x, b.y, b.width, b.height])(document.querySelector(%r).getBoundingClientRect())"
        x, y, width, height = self.run(script % selector)
        return x, y, width, height

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Scroll the mouse wheel over a point; negative is up (zooms in)."""
        self.ask("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def move(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Drag with the left button."""
        button: dict[str, Any] = {"button": "left", "buttons": 1, "clickCount": 1}
        self.move(x, y)
        self.ask("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **button)
        for part in (0.3, 0.6, 1.0):
            at = {"x": x + part * (to_x - x), "y": y + part * (to_y - y)}
            self.ask("Input.dispatchMouseEvent", type="mouseMoved", **at, **button)
        self.ask("Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y, **button)

    def picture(self, path: Path | None = None, whole: bool = False) -> np.ndarray[Any, Any]:
        """A screenshot: height x width x 3 (uint8); of the whole page, or of the window. Kept as PNG at `path`."""
        from matplotlib.image import imread

        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(data)
        return np.rint(imread(io.BytesIO(data), format="png")[:, :, :3] * 255).astype(np.uint8)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._session = ""
            self.ask("Browser.close")
        except (OSError, RuntimeError, TimeoutError):
            self._process.terminate()
        self._process.wait(timeout=10)
        os.close(self._read)
        os.close(self._write)
        self._home.cleanup()
