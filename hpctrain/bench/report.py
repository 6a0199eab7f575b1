"""Results of measurements, as aligned text and as plain values."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hpctrain.bench.comparison import Comparison


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in `unit`; in benches that measure several things in turn, one per block."""

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and upper quartile."""
        low, high = np.percentile(self.values, [25, 75])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{number(self.median)} ({number(low)}-{number(high)})"

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, high = self.quartiles
        summary = {"median": self.median, "q25": low, "q75": high, "n": len(self.values), "unit": self.unit}
        return {**summary, "values": list(self.values)}


@dataclass
class FigureTable:
    """`rows[label][column]`; `title` names the unit of the cells. `comparisons` and `notes` are printed below it."""

    name: str
    title: str
    columns: Sequence[str]
    rows: dict[str, dict[str, Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    def text(self) -> str:
        """Aligned text: labels to the left, cells to the right."""
        lines = [["", *self.columns]]
        for label, cells in self.rows.items():
            lines.append([label, *(str(cells[c]) if c in cells else "-" for c in self.columns)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns) + 1)]
        body = ["  ".join(_pad(cell, widths[i], i) for i, cell in enumerate(line)).rstrip() for line in lines]
        return "\n".join([self.title, *body, *map(str, self.comparisons), *self.notes])

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = {label: {c: sample.plain() for c, sample in cells.items()} for label, cells in self.rows.items()}
        comparisons = [comparison.plain() for comparison in self.comparisons]
        return {"title": self.title, "rows": rows, "comparisons": comparisons, "notes": self.notes}


@dataclass
class Report:
    """Tables, in order. `hosts`: the names of those that were measured, where there were several."""

    tables: list[FigureTable] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All tables, with a description of the machine."""
        return "\n\n".join([self._about(), *(table.text() for table in self.tables)])

    def lines(self) -> Iterator[tuple[str, str, str, int | str, float, str]]:
        """(bench, row, column, block, value, unit) of every value; comparisons have no block, but `low` and `high`."""
        for table in self.tables:
            for label, cells in table.rows.items():
                for column, sample in cells.items():
                    for block, value in enumerate(sample.values):
                        yield table.name, label, column, block, value, sample.unit
            for each in table.comparisons:
                for what, value in (("", each.value), ("low", each.low), ("high", each.high)):
                    yield table.name, each.what, each.column, what, value, "comparison"

    def csv(self) -> str:
        """`lines` as comma-separated values, with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("bench", "row", "column", "block", "value", "unit"))
        writer.writerows(self.lines())
        return out.getvalue()

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"machine": self._about(), **{table.name: table.plain() for table in self.tables}}

    def _about(self) -> str:
        hosts = f"; hosts: {len(self.hosts)}, {' '.join(self.hosts)}" if self.hosts else ""
        return machine() + hosts


def machine() -> str:
    """A description of this machine in one line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores; median (quartiles) of interleaved repetitions"


def number(value: float) -> str:
    """Three significant digits, with thousands separators."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
