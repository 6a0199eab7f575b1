"""The layouts of older schema versions, and the conversion of their rows to the current one. No other code knows them.

Versions 1 and 2 have the same layout. Their events are sentences, which are parsed here; a phase is one byte. Version 3
lacks only the table of device times.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from hpctrain.trace.events import (
    CheckpointWritten,
    Event,
    Failure,
    MeasuredLink,
    PhaseEntered,
    PhaseSwitch,
    PlainEvent,
    RuleStatistic,
    from_json,
    written,
)
from hpctrain.trace.schema import SCHEMA_VERSION, TABLES, Kind

Rows = np.ndarray[Any, Any]

# Older versions that can be read, with what they lack.
OLDER_VERSIONS = {
    1: "messages and barriers that no rank waited for are not recorded, nor are items and operations of spans",
    2: "items and operations of spans are not recorded",
    3: "device times are not recorded",
}
READER_NOTES = {1: OLDER_VERSIONS[1]}  # what a reader of the figures must know

_OTHERWISE = {("steps", "phase"): "u1"}
_ABSENT = {("spans", "items"), ("spans", "flops")}


def _before(table: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    names = [name for name in dtype.names or () if (table, name) not in _ABSENT]
    return np.dtype([(name, _OTHERWISE.get((table, name), dtype[name].str)) for name in names])


_TABLES_3 = {table: dtype for table, dtype in TABLES.items() if table != "device"}
_TABLES_2 = {table: _before(table, dtype) for table, dtype in _TABLES_3.items()}
_TABLES_2["events"] = np.dtype([("t_ns", "<i8"), ("kind", "S24"), ("text", "S240")])

_ENTRY = re.compile(r"phase (\d{1,9}): (\w+) of (.+)")
_COMPUTED = re.compile(
    r"(?P<rule>\S+?):? +(?P<of>metric +)?(?P<value>[-+.\w]+) +(?P<sign><=|>=|<|>|against) +(?P<threshold>[-+.\w]+)"
    r"(?:, (?P<unready>.*))?"
)


def layout(version: int) -> dict[str, np.dtype[Any]]:
    """The tables of a file of schema `version`."""
    return {SCHEMA_VERSION: TABLES, 3: _TABLES_3}.get(version, _TABLES_2)


def upgraded(table: str, rows: Rows, version: int) -> Rows:
    """Convert `rows` of a file of schema `version` to `schema.TABLES`; missing fields are 0."""
    if rows.dtype == TABLES[table]:
        return rows
    found: Rows = np.zeros(len(rows), TABLES[table])
    for name in set(TABLES[table].names or ()) & set(rows.dtype.names or ()):
        found[name] = rows[name]
    if table == "spans":  # how many additions is unknown, but a sum without a number was the rank's own
        found["flops"][(rows["kind"] == Kind.REDUCE) & (rows["id"] < 0)] = 1.0
    if table == "events":
        found["json"] = [
            written(parsed(kind.decode(errors="replace"), text.decode(errors="replace")))[1]
            for kind, text in zip(rows["kind"].tolist(), rows["text"].tolist(), strict=True)
        ]
    return found


def parsed(kind: str, text: str) -> Event:
    """The event that schema versions before 3 wrote as this sentence."""
    if kind == PhaseEntered.kind and (entry := _ENTRY.fullmatch(text)):
        return PhaseEntered(int(entry[1]), entry[2], entry[3])
    if kind == RuleStatistic.kind and (found := _COMPUTED.fullmatch(text)):
        try:
            value, threshold = float(found["value"]), float(found["threshold"])
        except ValueError:
            return PlainEvent(kind, text)
        return RuleStatistic(
            found["rule"], value, found["sign"], threshold, (found["of"] or "").strip(), found["unready"] or ""
        )
    if kind == MeasuredLink.kind:
        return from_json(kind, text)
    if kind == PhaseSwitch.kind:
        return PhaseSwitch(text)
    if kind == CheckpointWritten.kind:
        return CheckpointWritten(text)
    if kind == Failure.kind:
        return Failure(*text.split(": ", 1)) if ": " in text else PlainEvent(kind, text)
    return PlainEvent(kind, text)
