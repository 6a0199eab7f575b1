"""Reads metrics.csv while it is being written."""

from __future__ import annotations

import csv
from pathlib import Path

from hpctrain.text import shown
from hpctrain.trace.files import read_regular
from hpctrain.trace.reader import LONGEST_METRICS
from hpctrain.views.watch.snapshot import EvaluationRow


def read_evaluations(path: Path) -> list[EvaluationRow]:
    """The rows of the file at `path`, without an incomplete last line; empty if there is no such file."""
    try:
        text = read_regular(path, LONGEST_METRICS).decode(errors="replace")
        table = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    except (OSError, csv.Error):
        return []
    rows = []
    for row in table:
        try:
            epoch, metric = float(row["epoch"]), float(row["metric"])
            loss = float(row["loss"]) if row["loss"] else None
            rows.append(EvaluationRow(shown(row["split"], 20), epoch, loss, metric))
        except (KeyError, TypeError, ValueError):
            continue
    return rows
