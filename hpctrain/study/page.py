"""The page of a study: what has run so far, as Markdown with pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.job import Job
from hpctrain.study import pictures, text
from hpctrain.study.case import Case, Setting, Variant
from hpctrain.study.kept import Kept
from hpctrain.study.payload import ratios
from hpctrain.study.table import Line, Wanted, lines

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Settings, the targets of their rows (by the name of the setting), and where results are kept. `host`: the setting
    whose rows are timed on one host. `slow`: the rows of the table of a slow worker. `shapes`: models, by name, whose
    payloads are computed: a job each."""

    settings: Sequence[Setting]
    targets: Sequence[tuple[str, Wanted]]
    kept: Kept
    host: Setting
    slow: Mapping[str, Variant]
    shapes: Mapping[str, Job]

    def cases(self, setting: Setting) -> list[Case]:
        """All runs of a setting."""
        return [Case(setting, row, seed) for row in setting.rows.values() for seed in range(setting.seeds)]

    def lines(self, setting: Setting) -> list[Line]:
        """What has run of it."""
        return lines(self.kept.frame(self.cases(setting)), list(setting.rows), setting.base)

    def measured(self, name: str, rows: Mapping[str, Variant]) -> dict[str, Figures]:
        """Measurements with real ranks, by row, in the order of `rows`; without those of other keys. `name`: "host" or
        "slow"."""
        path = self.kept.folder / f"{name}.json"
        found: dict[str, Figures] = json.loads(path.read_text()) if path.exists() else {}
        return {row: found[row] for row, of in rows.items() if found.get(row, {}).get("keys") == list(of.keys)}

    def note(self, name: str, found: Mapping[str, Figures], rows: Mapping[str, Variant]) -> None:
        """Keep such measurements."""
        self.kept.note(name, {row: {"keys": rows[row].keys, **figures} for row, figures in found.items()})


@dataclass(frozen=True)
class Prose:
    """What a person wrote of the study. `head`: its title and what it is; `advice`: what follows from it; `reading`:
    what the columns mean; `shapes`, `slow`: what the tables of payloads and of the slow worker show; `rates`: how rates
    were chosen."""

    head: str
    advice: str
    reading: str
    shapes: str
    slow: str
    rates: str


def write(study: Study, prose: Prose, path: Path) -> None:
    """Write the page and, in the folder of the results, its pictures."""
    path.write_text("\n".join(page(study, prose, path.parent)).rstrip("\n") + "\n")


def page(study: Study, prose: Prose, folder: Path) -> Iterator[str]:
    """The lines of the page, which lies in `folder`. Draws the pictures."""
    found = {setting.name: study.lines(setting) for setting in study.settings}
    yield from (prose.head, "## What to take when", "", prose.advice)
    yield from ("## Targets", "", *_targets(study, found), "")
    yield from ("## How to read the tables", "", prose.reading)
    for setting in study.settings:
        if found[setting.name]:
            yield from (f"## {setting.title}", "", *_setting(study, setting, found[setting.name], folder), "")
    yield from ("## Payloads of other models", "", prose.shapes)
    yield from (*text.payload_table({name: ratios(job) for name, job in study.shapes.items()}), "")
    if slow := study.measured("slow", study.slow):
        yield from ("## One of four workers three times slower", "", prose.slow, *text.slow_table(slow), "")
    yield from ("## How the rates were chosen", "", prose.rates)


def _targets(study: Study, found: Mapping[str, Sequence[Line]]) -> Iterator[str]:
    titles = {setting.name: setting.title for setting in study.settings}
    by = {(name, line.row): line for name, some in found.items() for line in some}
    chosen = [(titles[name], target, by.get((name, target.row))) for name, target in study.targets if name in titles]
    return text.target_table(chosen)


def _setting(study: Study, setting: Setting, found: Sequence[Line], folder: Path) -> Iterator[str]:
    done, wanted = sum(line.seeds for line in found), len(study.cases(setting))
    yield f"jobs/{setting.file.name}{''.join(f', {key}' for key in setting.keys)}: {done} of {wanted} runs."
    yield ""
    yield from text.main_table(found, setting)
    yield from ("", _picture(study, f"{setting.name}.png", "payload and " + setting.metric, folder))
    pictures.draw_rows(found, setting.base, setting.metric, study.kept.folder / f"{setting.name}.png")
    if setting == study.host:
        measured = study.measured("host", setting.rows)
        here = {row: figures["ms"] for row, figures in measured.items()}
        yield from ("", "### Milliseconds per step", "", *text.time_table(found, here))
        if here:
            times = min(len(figures["runs"]) for figures in measured.values())
            yield from ("", f"Measured {times} time{'s' * (times > 1)}; medians.")
            yield from ("", _picture(study, "steps.png", "milliseconds per step", folder))
            pictures.draw_times(found, here, study.kept.folder / "steps.png")


def _picture(study: Study, name: str, what: str, folder: Path) -> str:
    return f"![{what}]({(study.kept.folder / name).relative_to(folder)})"
