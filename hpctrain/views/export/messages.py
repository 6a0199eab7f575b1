"""Finds the messages with both ends traced, and numbers them: they are the flows of a timeline.

Each sender numbers its messages to another rank, so their ids form a few ranges of consecutive numbers; only the ranges
are kept, not the ids. Matching 10^8 messages takes no more memory than one rank's file.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import Any

import numpy as np

from hpctrain.trace import Kind, Run
from hpctrain.views.export.selection import Rows, Selection
from hpctrain.views.export.traceformat import Numbers
from hpctrain.views.progress import Progress

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Course = tuple[int, int, int]  # attempt, source, destination
COLUMNS = ("kind", "piece", "bytes", "peer", "id")


def is_sent(spans: Rows) -> Mask:
    """Mask of the spans in which a message starts. A later wait for its completion is a span with the same id and no
    bytes."""
    return _of_message(spans, Kind.SEND) & (spans["bytes"] > 0)


def is_received(spans: Rows) -> Mask:
    return _of_message(spans, Kind.RECV)


def _of_message(spans: Rows, kind: Kind) -> Mask:
    mask: Mask = (spans["kind"] == kind) & (spans["peer"] >= 0) & (spans["id"] >= 0) & (spans["piece"] == 0)
    return mask


class Ids:
    """Distinct ids, as ranges of consecutive ones. `first`: first id of each range; `before`: number of ids in all
    earlier ranges."""

    def __init__(self, ids: Numbers) -> None:
        """`ids`: in ascending order."""
        begins = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
        self.first, self.before, self.count = ids[begins], begins.astype(np.int64), len(ids)

    def all(self) -> Numbers:
        lengths = np.diff(self.before, append=self.count)
        return np.repeat(self.first - self.before, lengths) + np.arange(self.count)

    def place(self, ids: Numbers) -> Numbers:
        """The index of each id among these ids, from 0; -1 if absent."""
        if not self.count:
            return np.full(len(ids), -1)
        run = np.maximum(np.searchsorted(self.first, ids, side="right") - 1, 0)
        place: Numbers = self.before[run] + ids - self.first[run]
        end = np.append(self.before[1:], self.count)[run]
        return np.where((ids >= self.first[run]) & (place < end), place, -1)


class Messages:
    """The messages with both ends in the selection; `number` gives each a unique number, the same at both ends."""

    def __init__(self, run: Run, selection: Selection, progress: Progress) -> None:
        sent, received = _ends(run, selection, progress)
        self._matched: dict[Course, tuple[int, Ids]] = {}
        self.count = 0
        for course in sorted(sent.keys() & received.keys()):
            both = Ids(np.intersect1d(sent[course].all(), received[course].all(), assume_unique=True))
            self._matched[course] = self.count, both
            self.count += both.count

    def number(self, attempt: int, rank: int, spans: Rows) -> Numbers:
        """The number of each span's message; -1 if it has none or its other end is missing."""
        numbers = np.full(len(spans), -1, np.int64)
        for outgoing, mask in ((True, is_sent(spans)), (False, is_received(spans))):
            for peer in np.unique(spans["peer"][mask]).tolist():
                course = (attempt, rank, peer) if outgoing else (attempt, peer, rank)
                if course in self._matched:
                    base, ids = self._matched[course]
                    there = np.flatnonzero(mask & (spans["peer"] == peer))
                    place = ids.place(spans["id"][there])
                    numbers[there] = np.where(place >= 0, base + place, -1)
        return numbers


def _ends(run: Run, selection: Selection, progress: Progress) -> tuple[dict[Course, Ids], dict[Course, Ids]]:
    sent: dict[Course, Ids] = {}
    received: dict[Course, Ids] = {}
    columns = COLUMNS if selection.windows is None else (*COLUMNS, "start_ns", "end_ns")
    blocks = run.blocks("spans", selection.ranks, columns=columns)
    for (rank, attempt), parts in groupby(blocks, key=lambda block: block[:2]):
        out: defaultdict[int, list[Numbers]] = defaultdict(list)
        back: defaultdict[int, list[Numbers]] = defaultdict(list)
        for _, _, spans in parts:
            progress.advance(len(spans))
            spans = selection.cut(attempt, spans)
            _sort_by_peer(spans[is_sent(spans)], out)
            _sort_by_peer(spans[is_received(spans)], back)
        sent |= {(attempt, rank, peer): _once(ids) for peer, ids in out.items()}
        received |= {(attempt, peer, rank): _once(ids) for peer, ids in back.items()}
    return sent, received


def _sort_by_peer(spans: Rows, into: defaultdict[int, list[Numbers]]) -> None:
    for peer in np.unique(spans["peer"]).tolist():
        into[peer].append(spans["id"][spans["peer"] == peer])


def _once(parts: list[Numbers]) -> Ids:
    """The ids that occur once. An id that occurs twice does not identify a message and is left out."""
    ids, counts = np.unique(np.concatenate(parts), return_counts=True)
    return Ids(ids[counts == 1])
