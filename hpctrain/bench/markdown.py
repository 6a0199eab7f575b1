"""Tables of `hpctrain bench --json`, as Markdown for the pages that show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpctrain.bench.report import number


def table_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one table: medians (quartiles), comparisons with their intervals and targets, and its notes."""
    rows = table["rows"]
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    yield f"| {' | '.join([table['title'], *columns])} |"
    yield "|---" * (1 + len(columns)) + "|"
    for label, cells in rows.items():
        yield f"| {' | '.join([label, *(_cell(cells.get(column)) for column in columns)])} |"
    if table["comparisons"]:
        yield from ("", "| comparison | value | 95 % interval | target |", "|---|---|---|---|")
    for each in table["comparisons"]:
        interval = f"{number(each['low'])} to {number(each['high'])}" if each["blocks"] > 1 else "–"
        target = f"{each['target']}: **{each['verdict']}**" if "target" in each else ""
        yield f"| {each['what']}, {each['column']} | {number(each['value'])} | {interval} | {target} |"
    if table["notes"]:
        yield ""
        yield " ".join(note.rstrip(".") + "." for note in table["notes"])


def _cell(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return "–"
    if sample["n"] == 1:
        return number(sample["median"])
    return f"{number(sample['median'])} ({number(sample['q25'])}-{number(sample['q75'])})"
