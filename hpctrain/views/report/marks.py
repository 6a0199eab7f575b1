"""The marks above the rows of the timeline: phases and events."""

from __future__ import annotations

from typing import Any

from hpctrain.trace import Run
from hpctrain.trace.events import PhaseEntered, chosen

# kind of event -> (Bokeh's marker, colour). Roles are shown as phases; rule statistics and link
# measurements have figures of their own.
MARKERS = {
    "switch": ("inverted_triangle", "#D55E00"),
    "rebalance": ("triangle", "#CC79A7"),
    "failure": ("x", "#000000"),
    "checkpoint": ("diamond", "#0072B2"),
}
OTHERS = ("circle", "#777777")
HIDDEN = ("role", "rule", "network")
MOST_MARKS = 2000
_TOGETHER_S = 1.0  # events of one kind on several ranks within this many seconds are shown as one


def collect_phases(run: Run, phases: Any) -> list[dict[str, Any]]:
    """Per phase and attempt: start, end (s), text. From Analysis.phases or, if it is None or empty, from the events."""
    if phases is None or not len(phases):
        return _phases_of_events(run)
    found = []
    for (phase, attempt), part in phases.groupby(["phase", "attempt"]):
        start, end = ((int(x) - run.start_ns) / 1e9 for x in (part["start_ns"].min(), part["end_ns"].max()))
        text = f"phase {phase}: {part['strategy'].iloc[0]}"
        found.append({"start": start, "end": end, "text": text + (f", attempt {attempt}" if attempt > 1 else "")})
    return sorted(found, key=lambda phase: phase["start"])


def _phases_of_events(run: Run) -> list[dict[str, Any]]:
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for _, attempt, t_ns, entry in chosen(run.events(), PhaseEntered):
        text = f"phase {entry.phase}: {entry.strategy}"
        found.setdefault((attempt, text), {"start": (t_ns - run.start_ns) / 1e9, "end": None, "text": text})
    phases = list(found.values())
    for phase, following in zip(phases, phases[1:], strict=False):
        phase["end"] = following["start"]
    return phases


def collect_marks(run: Run) -> dict[str, Any]:
    """events: t (s), kind, text, ranks, marker, colour; left_out: the number of events too many to be drawn."""
    marks: list[dict[str, Any]] = []
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for event in run.events().to_dict("records"):
        kind, text, t, rank = event["kind"], event["text"], event["t_s"], event["rank"]
        if kind in HIDDEN:
            continue
        known = latest.get((kind, text))
        if known is not None and t - known["t"] < _TOGETHER_S:
            known["ranks"].append(rank)
            continue
        marker, colour = MARKERS.get(kind, OTHERS)
        mark = {"t": t, "kind": kind, "text": text, "ranks": [rank], "marker": marker, "colour": colour}
        latest[kind, text] = mark
        marks.append(mark)
    return {"events": marks[:MOST_MARKS], "left_out": max(0, len(marks) - MOST_MARKS)}
