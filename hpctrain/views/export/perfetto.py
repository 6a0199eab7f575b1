"""Writes a run as a timeline for Perfetto and chrome://tracing: JSON in the Trace Event Format, streamed.

There is a process per node and a thread per rank (plus one for a colocated server). Spans become complete events,
messages flows from send to receive, events instants, and resources counters. Times are microseconds since the run's
start on rank 0's clock, exact to the nanosecond. The description of the run follows the events, because older versions
of Perfetto stop at the first unknown key and take a "displayTimeUnit" before the events as the unit of their times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hpctrain import __version__
from hpctrain.output import output_text
from hpctrain.trace import Kind, Run
from hpctrain.trace.reader import name_ranks
from hpctrain.trace.schema import KINDS
from hpctrain.views.export.layout import TrackLayout
from hpctrain.views.export.marks import draw_events, draw_notes, draw_phases, draw_resources
from hpctrain.views.export.messages import Messages
from hpctrain.views.export.selection import Rows, Selection
from hpctrain.views.export.traceformat import Numbers, microseconds
from hpctrain.views.progress import Progress

COMPUTATION = ("data", "forward", "backward", "encode", "decode", "update")
COMMUNICATION = ("send", "recv", "reduce", "notify")
CATEGORIES = dict.fromkeys(COMPUTATION, "computation") | dict.fromkeys(COMMUNICATION, "communication")
HEADS = [f'"name":"{name}","cat":"{CATEGORIES.get(name, name)}","ph":"X"' for name in ("unknown", *KINDS)]
LEAVES = '"name":"message","cat":"message","ph":"s"'
ARRIVES = '"name":"message","cat":"message","ph":"f","bp":"e"'
LIBRARIES = ("python", "mpi", "torch", "numpy", "mpi4py", "h5py", "cupy")


def export_perfetto(run: Run, selection: Selection, path: Path, progress: Progress) -> None:
    """Write the timeline to `path`. Raises HpctrainError if it cannot be written."""
    total = sum(rows for (rank, _), rows in run.rows("spans").items() if rank in selection.ranks)
    with output_text(path) as file:
        progress.begin("matching messages: spans", total)
        messages = Messages(run, selection, progress)
        layout = TrackLayout(run, selection)
        file.write('{"traceEvents":[')
        write = _Separated(file)
        write(layout.name_all())
        progress.begin("writing spans", total)
        ends = _write_spans(run, selection, layout, messages, write, progress)
        for rank in selection.ranks:
            write(draw_resources(layout, run, selection, rank))
        write(draw_events(layout, selection))
        write(draw_phases(layout, selection, ends))
        write(draw_notes(layout, run, selection))  # last, because reading may add notes
        facts = json.dumps(_facts(run, selection, messages), indent=1)
        file.write(f'\n],\n"displayTimeUnit":"ns",\n"otherData":{facts}}}\n')


class _Separated:
    """Writes events separated by commas."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._before = file, "\n"

    def __call__(self, events: Iterable[str]) -> None:
        text = ",\n".join(events)
        if text:
            self._file.write(self._before + text)
            self._before = ",\n"


def _write_spans(
    run: Run, selection: Selection, layout: TrackLayout, messages: Messages, write: _Separated, progress: Progress
) -> dict[int, int]:
    """Write all spans; return when each attempt's last span ended."""
    ends: dict[int, int] = {}
    for rank, attempt, rows in run.blocks("spans", selection.ranks):
        spans = selection.cut(attempt, rows)
        if len(spans):
            ends[attempt] = max(ends.get(attempt, 0), int(spans["end_ns"].max()))
            write(layout.name_lanes(rank, spans))
            details = _details(spans, layout.phases_at(rank, attempt, spans["start_ns"]))
            write(_draw_spans(layout, rank, spans, details, messages.number(attempt, rank, spans)))
        progress.advance(len(rows))
    return ends


def _draw_spans(
    layout: TrackLayout, rank: int, spans: Rows, details: Iterator[str], messages: Numbers
) -> Iterator[str]:
    """Yield the events of spans and flows. `messages`: number of each span's message, -1 for none. A flow's end comes
    after its span, because Perfetto binds it to the newest span of its thread.
    """
    start, end = layout.since_start(spans["start_ns"]), layout.since_start(spans["end_ns"])
    leaves = spans["kind"] == Kind.SEND
    # The flow ends in the last nanosecond of the receive, which may have begun before the message was sent.
    flow = np.where(leaves, start, np.maximum(start, end - 1))
    pid, tids = layout.pid(rank), layout.tid(rank) + spans["lane"].astype(np.int64)
    columns = (
        spans["kind"].tolist(),
        *(microseconds(times).tolist() for times in (start, end - start, flow)),
        tids.tolist(),
        messages.tolist(),
        leaves.tolist(),
    )
    for args, kind, ts, dur, at, tid, message, leaving in zip(details, *columns, strict=True):
        yield f'{{{HEADS[kind]},"ts":{ts!r},"dur":{dur!r},"pid":{pid},"tid":{tid},"args":{args}}}'
        if message >= 0:
            yield f'{{{LEAVES if leaving else ARRIVES},"id":{message},"ts":{at!r},"pid":{pid},"tid":{tid}}}'


def _details(spans: Rows, phases: Numbers) -> Iterator[str]:
    """Yield the details of each span as a JSON object."""
    columns = [spans[name].tolist() for name in ("step", "bytes", "peer", "id", "piece")]
    for phase, step, nbytes, peer, id, piece in zip(phases.tolist(), *columns, strict=True):
        args = []
        if phase >= 0:
            args.append(f'"phase":{phase}')
        if step >= 0:
            args.append(f'"step":{step}')
        if nbytes > 0:
            args.append(f'"bytes":{nbytes}')
        if peer >= 0:
            args.append(f'"peer":{peer}')
        if id >= 0:
            args.append(f'"id":"{id}"')  # as text, because JavaScript numbers are exact to 53 bits only
        if piece:
            args.append(f'"piece":{piece}')
        yield f"{{{','.join(args)}}}"


def _facts(run: Run, selection: Selection, messages: Messages) -> dict[str, Any]:
    attributes, steps = run.attributes(selection.ranks[0]), selection.steps
    facts: dict[str, Any] = {
        "run": run.folder.resolve().name,
        "hpctrain": __version__,
        "selected": f"{name_ranks(selection.ranks)} of {run.size}",
        "steps": "all" if steps is None else f"{steps.start} to {steps.stop - 1}",
        "attempts": len(run.attempts),
        "clock": "microseconds since the run's first span, on the clock of rank 0",
        "messages": messages.count,
        "notes": run.notes,
    }
    facts |= {name: attributes[name] for name in LIBRARIES if name in attributes}
    return facts | {"job": str(attributes.get("job", ""))}
