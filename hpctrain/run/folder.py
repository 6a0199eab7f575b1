"""The run folder, and rank 0's messages to the user. Used on rank 0 only, except `describe_roles`."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from hpctrain.cluster import Roles
from hpctrain.errors import CheckpointError, JobError
from hpctrain.filenames import HISTORY, JOB, METRICS
from hpctrain.job import Job
from hpctrain.job.phases import StrategySpec
from hpctrain.launcher.started import has_own_terminal
from hpctrain.run.checkpoint import list_checkpoints
from hpctrain.text import shown

COLUMNS = ("step", "samples", "epoch", "seconds", "split", "loss", "metric")


def create(job: Job) -> Path:
    """Create an empty folder `<output>/<name>-<time>` that no other process gets. JobError if it cannot be created."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = Path(job.output) / f"{job.name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir(parents=True)  # atomic on shared file systems, too: only one process gets a name
            return folder
        except FileExistsError:
            if not Path(job.output).is_dir():
                break
        except OSError as error:
            raise JobError(
                f"output = {job.output!r}: the run folder {folder} cannot be created ({error.strerror}); "
                "choose a folder that you can write to"
            ) from None
    raise JobError(f"output = {job.output!r} is a file; choose a folder")


def write_job(folder: Path, job: Job, overrides: Sequence[str]) -> None:
    """Write job.toml: the resolved job, below a line with the overrides that the run began with. Raises OSError."""
    beside = folder / f".{JOB}.part"
    changed = f"# changed since, see {HISTORY}\n" if (folder / HISTORY).exists() else ""
    first = f"# {title(job.name, overrides)}\n" if overrides else ""
    beside.write_text(first + changed + job.dump())
    os.replace(beside, folder / JOB)


def title(name: str, overrides: Sequence[str]) -> str:
    """A job's name with its overrides: "digits with optimizer.lr=0.3, seed=4"."""
    return f"{name} with {', '.join(map(shown, overrides))}" if overrides else name


def discard(folder: Path | None) -> None:
    """Remove the folder of a run that could not begin."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run folder. Raises CheckpointError if there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint to resume from; train without --resume")
    return found[-1]


def metrics_row(
    step: int, samples: int, epoch: float, seconds: float, split: str, measured: dict[str, float]
) -> dict[str, str]:
    """One row of metrics.csv, by column. `measured`: loss, metric, and the run's other values, the same ones in every
    row. An evaluation without a loss has an empty cell."""
    place = {"step": str(step), "samples": str(samples), "epoch": f"{epoch:.4f}", "seconds": f"{seconds:.3f}"}
    return {**place, "split": split, "loss": "", **{name: f"{value:.6g}" for name, value in measured.items()}}


def append_metrics(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Append rows to metrics.csv, all or none. Raises OSError."""
    path = folder / METRICS
    before = path.stat().st_size if path.exists() else 0
    head = [] if before else [list(rows[0])]
    try:
        with open(path, "a", newline="") as file:
            csv.writer(file).writerows([*head, *(row.values() for row in rows)])
    except OSError:
        with suppress(OSError):
            os.truncate(path, before)  # remove a partial row
        raise


def forget_metrics(folder: Path, samples: int, owed: bool = False) -> None:
    """Remove the rows of metrics.csv after `samples`, where a resumed run continues; with `owed` also those at
    `samples`, because the run will write them again."""
    path = folder / METRICS
    if not path.exists():
        return
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    place = COLUMNS.index("samples")
    last = samples - owed
    kept = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[place]) <= last]
    beside = path.with_name(".metrics.csv.part")
    with open(beside, "w", newline="") as file:
        csv.writer(file).writerows(kept)
    os.replace(beside, path)


@dataclass
class PhaseSummary:
    """The summary of a phase. `seconds`: without evaluations and checkpoints, which took `pauses` seconds; `steps`:
    rounds, or updates if workers do not step together; `dropped`: gradients that arrived too late."""

    index: int
    strategy: str
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    pauses: float = 0.0
    loss: float = float("nan")
    dropped: int = 0

    def row(self) -> list[str]:
        rate = self.samples / self.seconds if self.seconds > 0 else float("nan")
        return [
            str(self.index),
            self.strategy,
            str(self.steps),
            str(self.samples),
            f"{self.seconds:.2f}",
            f"{rate:.0f}",
            f"{self.pauses:.2f}",
            f"{self.loss:.4f}",
        ]


def table(summaries: list[PhaseSummary]) -> str:
    """The summary table at the end of a run."""
    rows = [["phase", "strategy", "steps", "samples", "seconds", "samples/s", "paused s", "loss"]]
    rows += [summary.row() for summary in summaries]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = [[row[1].ljust(widths[1]) if i == 1 else row[i].rjust(widths[i]) for i in range(len(row))] for row in rows]
    return "\n".join("  ".join(row) for row in texts)


def name_of(spec: StrategySpec) -> str:
    """A strategy's name, with its mode if it has one: "parameter_server (async)"."""
    mode = getattr(spec.options, "mode", None)
    return f"{spec.name} ({mode})" if mode else spec.name


def describe_roles(roles: Roles) -> str:
    """The number of workers and servers: "3 workers, 1 server"."""
    counts = [(len(roles.workers), "worker"), (len(roles.servers), "server")]
    beside = " beside workers" if set(roles.servers) & set(roles.workers) else ""
    return ", ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in counts if n) + beside


@dataclass
class Narrator:
    """Reports progress: one line every few seconds; on a terminal the line is redrawn.

    If a line cannot be written (full disk, closed pipe), this is reported once on stderr and the run continues.
    """

    enabled: bool = True
    every: float = 2.0
    out: TextIO = field(default_factory=lambda: sys.stdout)
    _due: float = 0.0
    _open: bool = False

    def __post_init__(self) -> None:
        self.enabled = self.enabled and self.out is not None  # it is None if standard output was closed

    def say(self, text: str) -> None:
        """Write a permanent line."""
        if self.enabled:
            self._close_line()
            self._write(text + "\n")

    def due(self) -> bool:
        """Whether it is time for a progress line (cheap)."""
        if not self.enabled or (now := time.monotonic()) < self._due:
            return False
        self._due = now + (0.2 if self._live else self.every)
        return True

    def update(self, text: str) -> None:
        """Show a progress line; check `due` first."""
        if self._live:
            width = 80
            with suppress(OSError):  # the terminal may be gone
                width = os.get_terminal_size(self.out.fileno()).columns
            self._write("\r\x1b[K" + text[: width - 1])
            self._open = True
        else:
            self._write(text + "\n")

    @property
    def _live(self) -> bool:
        return self.out.isatty() and not has_own_terminal(os.environ)

    def _close_line(self) -> None:
        if self._open:
            self._write("\r\x1b[K")
            self._open = False

    def _write(self, text: str) -> None:
        try:
            self.out.write(text)
            self.out.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.enabled = self._open = False
            reason = getattr(error, "strerror", None) or error
            with suppress(OSError, ValueError):
                print(f"hpctrain: standard output cannot be written ({reason}); the run continues", file=sys.stderr)
