"""The comparison as a frame, which is also the content of the CSV file, and as text at most 100 characters wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.views.compare.scaling import scaling
from hpctrain.views.compare.summary import RunSummary
from hpctrain.views.compare.targets import Targets
from hpctrain.views.figures.style import in_unit

if TYPE_CHECKING:
    import pandas as pd

WIDTH, NARROWEST = 100, 8  # of the text, of a clipped column
CLOCKS = (
    "Times are seconds of training, without evaluation and checkpoints; in all: with them, but without "
    "the start of Python and MPI; cost: ranks x seconds in all."
)
EFFICIENCY = (
    "Parallel efficiency (POP): useful computation of the workers / their time, over all phases. Bytes: sent by all "
    "ranks, including through shared memory; a step is a round or, where workers do not step together, an update. "
    "Staleness: of each gradient, in updates."
)
SCALING = (
    "speed-up, its training seconds per sample / the run's; scaling efficiency, speed-up / ratio of ranks, servers "
    "included; computation scaling (POP), its useful computation per sample / the run's."
)
TESTED = ("test_loss", "test_metric")  # have columns of their own
MOST_NAMED = 6  # further values in a table
Row = dict[str, Any]
Cells = Sequence[Sequence[str]]
Show = Callable[[Sequence[float]], list[str]]  # of a column


def comparison_frame(runs: Mapping[str, RunSummary], targets: Targets, baseline: str | None = None) -> pd.DataFrame:
    """A row per run, with units in the column names. Empty: unknown; inf: never reached. `baseline`: its letter; if
    given, the columns of `scaling` are added."""
    import pandas as pd

    rows = [_row(letter, run, targets) for letter, run in runs.items()]
    if baseline is not None:
        rows = [
            row | {"baseline": baseline} | scaling(run, runs[baseline])
            for row, run in zip(rows, runs.values(), strict=True)
        ]
    return pd.DataFrame(rows)


def _row(letter: str, run: RunSummary, targets: Targets) -> Row:
    means = run.mean_losses(targets.window)["loss"]
    return {
        "run": letter,
        "name": run.name,
        "folder": str(run.folder),
        "strategy": run.strategy,
        "ranks": run.ranks,
        "workers": _by_phase(run.workers),
        "servers": _by_phase(run.servers),
        "colocated": run.colocated,
        "nodes": run.nodes,
        "attempts": run.attempts,
        "samples": run.samples,
        "steps": run.steps,
        "target_training_loss": targets.loss,
        "time_to_loss_s": run.time_to_loss(targets.loss, targets.window),
        "target_metric": targets.metric,
        "time_to_metric_s": run.time_to_metric(targets.metric),
        "final_training_loss": float(means.iloc[-1]) if len(means) else float("nan"),
        "metric_name": run.metric,
        "metric_split": run.split,
        "best_metric": run.best_metric,
        "test_loss": run.test_loss,
        "test_metric": run.test_metric,
        "staleness_mean_versions": run.staleness_mean,
        "staleness_p95_versions": run.staleness_p95,
        "samples_per_s": run.samples_per_s,
        "parallel_efficiency": run.parallel_efficiency,
        "load_balance": run.load_balance,
        "communication_efficiency": run.communication_efficiency,
        "bytes_per_step": run.transferred / run.steps if run.steps else float("nan"),
        "bytes_per_sample": run.transferred / run.samples if run.samples else float("nan"),
        "useful_s_per_sample": run.useful_s_per_sample,
        "training_s": run.training_s,
        "total_s": run.total_s,
        "cost_rank_s": run.rank_seconds,
        **{f"test_{name}": value for name, value in run.test_values.items()},
    }


def _by_phase(counts: Sequence[int]) -> str:
    """Counts by phase without repetitions: (4, 4, 3) -> "4, 3"."""
    changes = [str(n) for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]]
    return ", ".join(changes[:4] + ["..."] * (len(changes) > 4)) or "0"


# -- text ----------------------------------------------------------------------------------------------------
def as_text(frame: pd.DataFrame, definitions: Sequence[str], notes: Sequence[str]) -> str:
    """Tables of the runs, their losses and metrics, their speed and, with a baseline, their scaling; then the meaning
    of the columns, then the notes."""
    rows: list[Row] = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
    named = [str(name) for name in frame.columns if str(name).startswith("test_") and name not in TESTED]
    tables = [_named(rows, named[i : i + MOST_NAMED]) for i in range(0, len(named), MOST_NAMED)]
    learned = [_learned(rows), *tables]
    parts, meanings = [_about(rows), *learned, _speed(rows)], [*definitions, CLOCKS, EFFICIENCY]
    if "baseline" in frame:
        parts.append(_scaled(rows))
        meanings.append(f"Scaling against {rows[0]['baseline']}: {SCALING}")
    parts += ["\n".join(map(_fill, meanings)), "\n".join(_fill(f"note: {note}") for note in notes)]
    return "\n\n".join(part for part in parts if part)


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _about(rows: list[Row]) -> str:
    head = [["", "run", "strategy", "ranks", "workers", "servers", "nodes", "samples"]]
    body = [
        [*(str(row[name]) for name in ("run", "name", "strategy", "ranks", "workers", "servers", "nodes")),
         f"{row['samples']:,}"]
        for row in rows
    ]  # fmt: skip
    return aligned(head, body, left=3)


def _learned(rows: list[Row]) -> str:
    names = {str(row["metric_name"]) for row in rows}
    name = clip(names.pop(), 10) if len(names) == 1 else "metric"
    head = [
        ["", "", "seconds", "seconds to", "training", "best", "test", "test", "staleness"],
        ["", "strategy", "to loss", name, "loss", name, "loss", name, "mean/95 %"],
    ]
    columns = {
        "time_to_loss_s": seconds, "time_to_metric_s": seconds, "final_training_loss": plain, "best_metric": plain,
        "test_loss": plain, "test_metric": plain,
    }  # fmt: skip
    stale = zip(*(tenths([row[f"staleness_{name}_versions"] for row in rows]) for name in ("mean", "p95")), strict=True)
    both = [mean if mean == "-" else f"{mean} / {p95}" for mean, p95 in stale]
    return aligned(head, [[*cells, cell] for cells, cell in zip(_body(rows, columns), both, strict=True)], left=2)


def _named(rows: list[Row], columns: Sequence[str]) -> str:
    """Values of the last evaluation on the test samples, by name."""
    head = [["", "", *("test" for _ in columns)], ["", "strategy", *(clip(name[5:], 12) for name in columns)]]
    return aligned(head, _body(rows, dict.fromkeys(columns, plain)), left=2)


def _speed(rows: list[Row]) -> str:
    step, step_unit = _bytes(rows, "bytes_per_step")
    sample, sample_unit = _bytes(rows, "bytes_per_sample")
    head = [
        ["", "", "samples", "parallel", step_unit, sample_unit, "training", "in all", "cost"],
        ["", "strategy", "per s", "efficiency", "per step", "per sample", "(s)", "(s)", "(rank-s)"],
    ]
    columns = {
        "samples_per_s": plain, "parallel_efficiency": percent, "bytes_per_step": step, "bytes_per_sample": sample,
        "training_s": seconds, "total_s": seconds, "cost_rank_s": seconds,
    }  # fmt: skip
    return aligned(head, _body(rows, columns), left=2)


def _scaled(rows: list[Row]) -> str:
    head = [
        ["", "", "", "", "scaling", "computation"],
        ["", "strategy", "ranks", "speed-up", "efficiency", "scaling"],
    ]
    columns = {
        "ranks": whole, "speed_up": hundredths, "scaling_efficiency": percent, "computation_scaling": hundredths,
    }  # fmt: skip
    return aligned(head, _body(rows, columns), left=2)


# -- cells ---------------------------------------------------------------------------------------------------
def _body(rows: list[Row], columns: Mapping[str, Show]) -> list[list[str]]:
    shown = [show([row[name] for row in rows]) for name, show in columns.items()]
    heads = [[row["run"], row["strategy"]] for row in rows]
    return [head + list(cells) for head, cells in zip(heads, zip(*shown, strict=True), strict=True)]


def aligned(head: Cells, body: Cells, left: int) -> str:
    """Align cells in columns two spaces apart: the first `left` columns to the left, the others to the right. To fit
    into WIDTH, the left columns are clipped, the widest first."""
    widths = [max(len(cell) for cell in column) for column in zip(*head, *body, strict=True)]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    while excess > 0 and max(widths[:left]) > NARROWEST:
        widths[widths.index(max(widths[:left]))] -= 1
        excess -= 1
    lines = []
    for line in [*head, *body]:
        texts = [clip(cell, width).ljust(width) for cell, width in zip(line[:left], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(line[left:], widths[left:], strict=True)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    return "\n".join(lines)


def clip(text: str, width: int) -> str:
    """Shorten `text` to at most `width` characters, keeping its beginning and end."""
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[-tail:]}"


def number(value: float) -> str:
    """A number with four digits; "-" if unknown."""
    return plain([value])[0]


def plain(values: Sequence[float]) -> list[str]:
    """Use the same number of decimals for all, at most four: four digits for the largest, two for the smallest."""
    powers = [int(f"{value:.3e}".partition("e")[2]) for value in values if math.isfinite(value) and value]
    decimals = max(0, 3 - max(powers), 1 - min(powers)) if powers else 0
    return _cells(values, f",.{min(4, decimals)}f")


def whole(values: Sequence[float]) -> list[str]:
    return _cells(values, ",.0f")


def seconds(values: Sequence[float]) -> list[str]:
    """Hundredths of seconds; whole seconds if any value is at least 1000."""
    return _cells(values, ",.0f" if any(math.isfinite(value) and value >= 1000 for value in values) else ".2f")


def percent(values: Sequence[float]) -> list[str]:
    return _cells(values, ".1%")


def tenths(values: Sequence[float]) -> list[str]:
    return _cells(values, ".1f")


def hundredths(values: Sequence[float]) -> list[str]:
    return _cells(values, ".2f")


def _cells(values: Sequence[float], form: str) -> list[str]:
    return [
        "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:{form}}".replace("%", " %")
        for value in values
    ]


def _bytes(rows: list[Row], column: str) -> tuple[Show, str]:
    """(function that formats the values, the unit that fits the largest)."""
    factor, unit = in_unit(np.array([row[column] for row in rows], float))
    return lambda values: plain([factor * value for value in values]), unit
