"""The other contents of a timeline: events, phases, notes and resource use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.trace import Run
from hpctrain.views.export.layout import Entry, TrackLayout
from hpctrain.views.export.selection import Selection, Window
from hpctrain.views.export.traceformat import complete, counter, instant

if TYPE_CHECKING:
    import pandas as pd

SHARED_EVENTS = ("switch", "rule", "rebalance")  # all ranks take part and record the same event
SHORTEST_MEAN_NS = 100_000_000  # CPU times are counted in ticks of 10 ms
GLOBAL_EVENTS = (*SHARED_EVENTS, "checkpoint", "failure")
Series = tuple[str, str, list[float]]  # name, unit, values (NaN: unknown)


def draw_events(layout: TrackLayout, selection: Selection) -> Iterator[str]:
    """Draw events of the whole run as a line across the timeline, others as a mark on their rank."""
    seen = set()
    for row in layout.events.to_dict("records"):
        rank, attempt, t_ns, kind, text = (row[name] for name in ("rank", "attempt", "t_ns", "kind", "text"))
        if not _is_in(selection.window(attempt), t_ns) or (attempt, kind, text) in seen:
            continue
        if kind in SHARED_EVENTS:
            seen.add((attempt, kind, text))
        args = {"kind": kind, "text": text, "rank": rank, "attempt": attempt}
        place = (
            (layout.run_pid, layout.run_tid, "g")
            if kind in GLOBAL_EVENTS
            else (layout.pid(rank), layout.tid(rank), "t")
        )
        yield instant(f"{kind}: {text}", _since_start(layout, t_ns), *place, args)


def draw_notes(layout: TrackLayout, run: Run, selection: Selection) -> Iterator[str]:
    """Draw notes on what is missing at the beginning of the timeline, where they are easy to see."""
    windows = selection.windows
    begin = run.start_ns if windows is None else max(run.start_ns, min(after for after, _ in windows.values()))
    for note in run.notes:
        yield instant(f"note: {note}", _since_start(layout, begin), layout.run_pid, layout.run_tid, "g", {"text": note})


def draw_phases(layout: TrackLayout, selection: Selection, ends: dict[int, int]) -> Iterator[str]:
    """Draw each phase from its first rank's entry to the first entry into the next phase. `ends`: when each attempt
    ended, on the run's clock."""
    for attempt, end in ends.items():
        first: dict[int, Entry] = {}
        for (_, of_attempt), entries in layout.entries.items():
            for entry in entries if of_attempt == attempt else ():
                first[entry.phase] = min(first.get(entry.phase, entry), entry)
        order = sorted(first.values())
        for number, entry in enumerate(order):
            until = order[number + 1].t_ns if number + 1 < len(order) else end
            yield from _draw_phase(layout, selection, attempt, entry, until)


def _draw_phase(layout: TrackLayout, selection: Selection, attempt: int, entry: Entry, until: int) -> Iterator[str]:
    window = selection.window(attempt)
    if window is None:
        return
    begin, end = max(entry.t_ns, window[0]), min(until, window[1])
    if begin < end:
        name, args = f"phase {entry.phase}: {entry.strategy}", {"phase": entry.phase, "attempt": attempt}
        begin, length = _since_start(layout, begin), end - begin
        yield complete(name, "phase", begin, length, layout.run_pid, layout.run_tid, args)


def draw_resources(layout: TrackLayout, run: Run, selection: Selection, rank: int) -> Iterator[str]:
    """Draw resource use. Means since the previous sample (CPU, network, GPU) are shown over exactly that time."""
    for attempt, samples in run.resources(rank).groupby("attempt"):
        window = selection.window(int(str(attempt)))
        t_ns = samples["t_ns"].tolist()
        long_enough = [end - begin >= SHORTEST_MEAN_NS for begin, end in pairwise(t_ns)]
        for name, unit, values in _levels(rank, samples):
            yield from _counters(layout, window, rank, name, unit, t_ns, values)
        for name, unit, values in _rates(rank, samples, layout.speaks(rank)):
            means = [value if good else math.nan for value, good in zip(values[1:], long_enough, strict=True)]
            yield from _counters(layout, window, rank, name, unit, t_ns[:-1], means)


def _levels(rank: int, samples: pd.DataFrame) -> Iterator[Series]:
    for name, column in (("memory", "resident"), ("GPU memory", "gpu_memory")):
        yield f"rank {rank} {name}", "MiB", _known(samples[column] / 2**20, samples[column])


def _rates(rank: int, samples: pd.DataFrame, whole_node: bool) -> Iterator[Series]:
    """The rank's rates. `whole_node`: include the network, whose counters are those of the whole node."""
    for name, column in (("CPU", "cpu"), ("GPU", "gpu")):
        yield f"rank {rank} {name}", "%", _known(samples[column], samples[column])
    for name, column in (("network in", "net_in"), ("network out", "net_out")) if whole_node else ():
        bytes_per_ns = samples[column].diff() / samples["t_ns"].diff()
        yield name, "MB/s", _known(bytes_per_ns * 1e3, samples[column])


def _known(values: pd.Series[float], recorded: pd.Series[float]) -> list[float]:
    return values.where(recorded >= 0).astype(float).round(3).tolist()


def _counters(
    layout: TrackLayout, window: Window | None, rank: int, name: str, unit: str, t_ns: list[int], values: list[float]
) -> Iterator[str]:
    for at, value in zip(t_ns, values, strict=True):
        if math.isfinite(value) and _is_in(window, at):
            yield counter(name, _since_start(layout, at), layout.pid(rank), layout.tid(rank), unit, value)


def _is_in(window: Window | None, t_ns: int) -> bool:
    return window is not None and window[0] < t_ns <= window[1]


def _since_start(layout: TrackLayout, t_ns: int) -> int:
    return int(layout.since_start(np.array([t_ns], np.int64))[0])
