"""Tables of a study as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from hpctrain.study.case import Setting
from hpctrain.study.table import LIMITS, Line, Wanted


def main_table(found: Sequence[Line], setting: Setting) -> Iterator[str]:
    """What each row reaches and what it sends."""
    apart = "loss against" if setting.measure == "loss" else "points from"
    columns = ["row", setting.metric, f"{apart} {setting.base}", "loss", "payload, bytes", "times less"]
    columns += ["received, bytes", "busiest link, bytes", "times less"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in found:
        spread = f" ± {line.spread:.4f}" if line.seeds > 1 else ""
        cells = [line.row, f"{line.mean:.4f}{spread} ({line.seeds})", _apart(line, setting), f"{line.loss:.4f}"]
        cells += [whole(line.payload), times(line.saved), whole(line.received), whole(line.busiest)]
        yield "| " + " | ".join([*cells, times(line.link_saved)]) + " |"


def _apart(line: Line, setting: Setting) -> str:
    if line.row == setting.base or math.isnan(line.points):
        return ""
    return f"{100 * line.loss_change:+.1f} %" if setting.measure == "loss" else f"{line.points:+.2f}{line.uncertainty}"


def time_table(found: Sequence[Line], here: Mapping[str, float]) -> Iterator[str]:
    """Milliseconds per step. `here`: as measured without a wire, by row."""
    yield "| row | one host, measured | " + " | ".join(f"{name}, computed" for name in LIMITS) + " |"
    yield "|---" * (2 + len(LIMITS)) + "|"
    for line in found:
        own = here.get(line.row)
        wires = [line.wire_seconds(limit) * 1e3 for limit in LIMITS.values()]
        cells = [f"{own:.1f}" if own is not None else "–"]
        cells += [f"{wire + own:.1f}" if own is not None else f"– + {wire:.1f}" for wire in wires]
        yield "| " + " | ".join([line.row, *cells]) + " |"


def target_table(found: Sequence[tuple[str, Wanted, Line | None]]) -> Iterator[str]:
    """Targets with what was found. Each: the setting's title, the target, and the line, if it has run."""
    yield "| setting | row | wanted | found | reached |"
    yield "|---" * 5 + "|"
    for title, target, line in found:
        text, met = target.verdict(line) if line is not None else ("not run", False)
        verdict = "–" if line is None else "**yes**" if met else "**no**"
        yield f"| {title} | {target.row} | {target.text} | {text} | {verdict} |"


def payload_table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """How many times less a message takes. `found`: by model, then by codec."""
    yield "| codec | " + " | ".join(found) + " |"
    yield "|---" * (1 + len(found)) + "|"
    for codec in dict.fromkeys(codec for ratios in found.values() for codec in ratios):
        yield "| " + " | ".join([codec, *(times(ratios[codec]) for ratios in found.values())]) + " |"


def slow_table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """By row: seconds of training, samples per second, what it reached."""
    base = next(iter(found.values()))
    yield "| row | seconds | of the first row's | samples/s | accuracy |"
    yield "|---" * 5 + "|"
    for row, figures in found.items():
        share, rate = figures["seconds"] / base["seconds"], figures["samples"] / figures["seconds"]
        yield f"| {row} | {figures['seconds']:.1f} | {share:.2f} | {rate:,.0f} | {figures['metric']:.4f} |"


def whole(number: float) -> str:
    """A number of bytes, to three digits or to one byte."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def times(ratio: float) -> str:
    """How many times less."""
    return "–" if math.isnan(ratio) else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
