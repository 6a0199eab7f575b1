"""Shows a snapshot as a picture for a terminal or as a line of text."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hpctrain.views.watch.recent import SECONDS
from hpctrain.views.watch.snapshot import EvaluationRow, RankView, RunStatus, Snapshot

HEIGHTS, ASCII_HEIGHTS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
BAR, ASCII_BAR, BAR_WIDTH = ("█", "░"), ("#", "."), 30
MOST_NOTES = 4
MARGIN = 2  # lines kept free below the ranks: one for the cursor, one for a note on ranks left out
UNKNOWN = "-"


@dataclass
class LivePicture:
    """Draws `snapshot` at the available width. `fit`: limit it to the terminal's height; else all ranks are shown."""

    snapshot: Snapshot
    fit: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shot, width, ascii_only = self.snapshot, options.max_width, options.ascii_only
        head = [*_head(shot, width, ascii_only)]
        foot = [Text(f"note: {note}", style="yellow") for note in shot.notes[:MOST_NOTES]]
        if len(shot.notes) > MOST_NOTES:
            foot.append(Text(f"and {len(shot.notes) - MOST_NOTES} more notes", style="yellow"))
        room = max(1, options.max_height - len(head) - len(foot) - MARGIN - 1) if self.fit else None
        for line in head:
            line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            yield line
        if shot.ranks:
            shown = _choose(shot.ranks, room)
            yield _table(shown, mark_ended=not shot.status.over)
            if len(shown) < len(shot.ranks):
                yield Text(f"{len(shown)} of {len(shot.ranks)} ranks; silent and slowest ranks first", style="dim")
        for line in foot:
            line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            yield line


# -- the lines above the ranks -----------------------------------------------------------------------------------
def _head(shot: Snapshot, width: int, ascii_only: bool) -> Iterable[Text]:
    yield _title(shot)
    if shot.status is not RunStatus.RUNNING:
        yield Text(_explain(shot), style="bold yellow" if shot.status is RunStatus.SILENT else "bold")
    if shot.strategy:
        more = (shot.phases or 0) - shot.phase - 1
        yield Text(f"phase {shot.phase}    {shot.strategy}{f', {more} more to come' if more > 0 else ''}")
    if shot.cursor is not None:
        yield from _progress(shot, ascii_only)
        yield _loss(shot, width, ascii_only)
    if shot.rate is not None:
        yield _speed(shot)
    for row in shot.evaluations:
        best = shot.best if shot.best is not None and shot.best.split == row.split else None
        yield Text(f"{row.split:<10} {_evaluation(shot, row)}{f', best {best.metric:.4f}' if best else ''}")
    for notice in shot.notices:
        yield Text(f"{notice.kind:<10} at {duration(notice.seconds)}: {notice.text}")
    if shot.ranks:
        yield Text(f"of the last {SECONDS} seconds:", style="dim")


def _title(shot: Snapshot) -> Text:
    text = Text(shot.name, style="bold")
    text.append(f"  {shot.status.value}", style="bold")
    if shot.size:
        text.append(f"  {duration(shot.elapsed)}", style="not bold")
        text.append(f"  {_counts(shot)}", style="not bold")
    if shot.attempt > 1:
        text.append(f"  attempt {shot.attempt}", style="not bold")
    return text


def _counts(shot: Snapshot) -> str:
    roles = Counter(view.role for view in shot.ranks)
    words = [_plural(count, role) for role, count in sorted(roles.items(), reverse=True)]
    return f"{', '.join(words)} on {_plural(shot.nodes, 'node')}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _explain(shot: Snapshot) -> str:
    since = f"{time.strftime('%H:%M:%S', time.localtime(shot.since))} ({duration(shot.silence)} ago)"
    match shot.status:
        case RunStatus.WAITING:
            return f"the run has not started writing; its folder was created at {since}"
        case RunStatus.SILENT:
            return f"nothing written since {since}: the run hangs or was killed"
        case RunStatus.STOPPED:
            return f"the run stopped before its end, at {since}; hpctrain train --resume {shot.folder}"
        case _:
            return f"the run finished at {since}"


def _progress(shot: Snapshot, ascii_only: bool) -> Iterable[Text]:
    if shot.share is None:
        yield Text(f"done       {shot.cursor:,} samples; the total is unknown")
        return
    full, empty = ASCII_BAR if ascii_only else BAR
    bar = (full * round(BAR_WIDTH * shot.share)).ljust(BAR_WIDTH, empty)
    most = " at most" if shot.may_stop_early else ""
    left = "" if shot.left is None or not shot.status.going else f", {duration(shot.left)} left{most}"
    yield Text(f"done       {bar} {100 * shot.share:.0f} %{left}")
    epochs = f" of {shot.epochs:g}" if shot.epochs is not None else ""
    yield Text(f"sample     {shot.cursor:,} of {shot.total:,}, epoch {shot.epoch:.2f}{epochs}")


def _loss(shot: Snapshot, width: int, ascii_only: bool) -> Text:
    now = UNKNOWN if shot.loss is None else f"{shot.loss:.4f}"
    if len(shot.history) < 2:
        return Text(f"loss       {now}")
    line = sparkline(shot.history, ASCII_HEIGHTS if ascii_only else HEIGHTS)
    ends = f"  from {shot.history[0]:.4f}"
    room = width - len(f"loss       {now}  {ends}")
    return Text(f"loss       {now}  {line[-max(0, room) :]}{ends}")


def _speed(shot: Snapshot) -> Text:
    text = f"speed      {shot.rate:,.0f} samples/s"
    rates = sorted(view.rate for view in shot.ranks if view.rate is not None)
    if len(rates) > 1:
        text += f", {rates[0]:,.0f} to {rates[-1]:,.0f} per worker"
    waits = _waits(shot)
    if len(waits) > 1:
        text += f"; waiting {100 * median(waits):.0f} % ({100 * waits[0]:.0f} to {100 * waits[-1]:.0f} %)"
    return Text(text)


def _waits(shot: Snapshot) -> list[float]:
    """The workers' shares of waiting, in ascending order."""
    return sorted(view.waiting for view in shot.ranks if view.waiting is not None and view.role == "worker")


def _evaluation(shot: Snapshot, row: EvaluationRow) -> str:
    loss = "" if row.loss is None else f", loss {row.loss:.4f}"
    return f"{shot.metric} {row.metric:.4f}{loss} at epoch {row.epoch:.2f}"


def sparkline(values: Sequence[float], heights: str = HEIGHTS) -> str:
    """A character per value, scaled from the lowest to the highest. The scale is logarithmic if all are positive,
    because late in a run losses differ little in absolute terms."""
    if min(values) > 0:
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(heights[min(len(heights) - 1, int((value - low) / span * len(heights)))] for value in values)


def duration(seconds: float) -> str:
    """ "0:01:20"; preceded by the days if there are any."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


# -- the ranks ---------------------------------------------------------------------------------------------------
def _choose(ranks: Sequence[RankView], room: int | None) -> Sequence[RankView]:
    """All ranks if there is room; else silent ranks first, then the workers that take longest per sample."""
    if room is None or len(ranks) <= room:
        return ranks
    return sorted(ranks, key=lambda r: (-(r.silent or 0.0), r.role != "worker", -(r.sample_seconds or 0.0)))[:room]


def _table(ranks: Sequence[RankView], mark_ended: bool) -> Table:
    stale = any(view.staleness is not None and view.staleness[1] > 0 for view in ranks)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for title in ("samples/s", "ms/sample", "waiting", *(["staleness"] if stale else [])):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="crop")
    for view in ranks:
        cells = [str(view.rank), view.role, *_numbers(view), *([_staleness(view)] if stale else [])]
        table.add_row(*cells, _mark(view, mark_ended), style=_style(view))
    return table


def _numbers(view: RankView) -> list[str]:
    rate = UNKNOWN if view.rate is None else f"{view.rate:,.0f}" if view.rate >= 100 else f"{view.rate:.3g}"
    took = UNKNOWN if view.sample_seconds is None else f"{1e3 * view.sample_seconds:.3g}"
    waits = UNKNOWN if view.waiting is None else f"{100 * view.waiting:.0f} %"
    return [rate, took, waits]


def _staleness(view: RankView) -> str:
    return UNKNOWN if view.staleness is None else f"{view.staleness[0]:.1f}, max {view.staleness[1]}"


def _mark(view: RankView, mark_ended: bool = False) -> str:
    marks = [f"silent for {duration(view.silent)}"] if view.silent is not None else []
    marks += [f"straggler: {view.slowness:.1f}x"] if view.slowness is not None else []
    return ", ".join(marks or ["ended"] * (view.ended and mark_ended))


def _style(view: RankView) -> str:
    return "bold yellow" if view.silent is not None or view.slowness is not None else ""


# -- one line ----------------------------------------------------------------------------------------------------
def line(shot: Snapshot) -> str:
    """The snapshot as one line, for a log."""
    parts = [time.strftime("%H:%M:%S"), shot.status.value if shot.status is RunStatus.RUNNING else _explain(shot)]
    if shot.share is not None:
        parts.append(f"{100 * shot.share:.0f} %")
    if shot.strategy:
        parts.append(f"phase {shot.phase} {shot.strategy}")
    if shot.epoch is not None:
        parts.append(f"epoch {shot.epoch:.2f}")
    if shot.loss is not None:
        parts.append(f"loss {shot.loss:.4f}")
    if shot.rate is not None:
        parts.append(f"{shot.rate:,.0f} samples/s")
    if waits := _waits(shot):
        parts.append(f"waiting {100 * median(waits):.0f} %")
    if shot.left is not None and shot.status is RunStatus.RUNNING:
        parts.append(f"{duration(shot.left)} left{' at most' if shot.may_stop_early else ''}")
    parts += [f"rank {view.rank} {_mark(view)}" for view in shot.ranks if _style(view)]
    return "  ".join(parts)
