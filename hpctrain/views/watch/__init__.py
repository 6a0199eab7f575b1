"""`hpctrain watch RUN`: shows the progress of a run in another terminal.

It only reads, without locks, what the ranks have flushed, so it does not affect the run.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from rich.console import Console

    from hpctrain.views.watch.snapshot import Snapshot
    from hpctrain.views.watch.watcher import Watcher

GIVE_UP_SECONDS = 900.0  # of silence, when not on a terminal
SIZE_SECONDS = 0.2  # how often to check the size of the terminal


def watch(run: Path, every: float = 2.0, once: bool = False) -> int:
    """Watch the run in the folder `run` until it ends, looking every `every` seconds; `once`: print one picture.

    On a terminal a picture is redrawn; elsewhere each look prints a line. At the end, and after Ctrl-C, the last
    picture stays. Returns the exit status: 130 after Ctrl-C while the ranks were still writing, else 0. Raises
    TraceError for a folder that is not a run or whose traces cannot be read; HpctrainError for an invalid `every`.
    """
    from rich.console import Console

    from hpctrain.trace.reader import run_folder
    from hpctrain.views.watch.picture import LivePicture
    from hpctrain.views.watch.watcher import Watcher

    if not 0.1 <= every <= 3600:
        raise HpctrainError(f"--every {every:g}: expected 0.1 to 3600 seconds between updates")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a run's name may have characters the terminal cannot show
    console, watcher = Console(highlight=False), Watcher(run_folder(run))
    redraws = sys.stdout.isatty() and not console.is_dumb_terminal
    left = False
    shot = watcher.look()
    if not once and not shot.status.over:
        try:
            (_redraw if redraws else _print_lines)(console, watcher, shot, every)
        except KeyboardInterrupt:
            left = True
        shot = watcher.look()
    console.print(LivePicture(shot, fit=redraws and not once))
    return 130 if left and shot.status.going else 0


def _redraw(console: Console, watcher: Watcher, shot: Snapshot, every: float) -> None:
    """Redraw a picture that fills the terminal until the run is over."""
    from rich.live import Live

    from hpctrain.views.watch.picture import LivePicture

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not shot.status.over:
            live.update(LivePicture(shot, fit=True), refresh=True)
            due = time.monotonic() + every
            while (rest := due - time.monotonic()) > 0:
                size = console.size
                time.sleep(min(SIZE_SECONDS, rest))
                if console.size != size:
                    live.refresh()
            shot = watcher.look()


def _print_lines(console: Console, watcher: Watcher, shot: Snapshot, every: float) -> None:
    """Print a line per look until the run is over, or silent for so long that it must have been killed."""
    from hpctrain.views.watch.picture import line

    while not shot.status.over and shot.silence < GIVE_UP_SECONDS:
        print(line(shot), flush=True)
        time.sleep(every)
        shot = watcher.look()
