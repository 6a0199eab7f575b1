"""Where the time went: totals per rank and span kind, as a frame and as the text of `hpctrain trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.trace.reader import Run
from hpctrain.trace.schema import KINDS

if TYPE_CHECKING:
    import pandas as pd


def sum_times(run: Run) -> pd.DataFrame:
    """A row per rank and lane: rank, lane, role, time, span kinds ..., unaccounted, steps, samples, rate.

    All in seconds, but rate: samples per second of the rank's time. `time`: from the rank's first span to the
    end of its last, summed over attempts; `unaccounted`: what of it no span covers. Lanes other than 0
    (colocated servers) run beside the rank's own course: their time is not part of it. Steps done again are
    counted once.
    """
    import pandas as pd

    sums: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    extents: dict[tuple[int, int, int], tuple[int, int]] = {}
    for rank, attempt, block in run.blocks("spans"):
        for lane in np.unique(block["lane"]).tolist():
            spans = block[block["lane"] == lane] if block["lane"].any() else block
            took = np.bincount(spans["kind"], (spans["end_ns"] - spans["start_ns"]) / 1e9, minlength=256)
            sums[rank, lane] = sums.get((rank, lane), 0.0) + took
            start, end = extents.get((rank, lane, attempt), (1 << 62, -(1 << 62)))
            bounds = min(start, int(spans["start_ns"].min())), max(end, int(spans["end_ns"].max()))
            extents[rank, lane, attempt] = bounds
    steps = run.steps().groupby("rank")["samples"].agg(["size", "sum"])
    for rank in run.ranks:
        sums.setdefault((rank, 0), np.zeros(256))
    rows = []
    for (rank, lane), took in sorted(sums.items()):
        time = sum((b - a) / 1e9 for (r, n, _), (a, b) in extents.items() if (r, n) == (rank, lane))
        count, samples = (
            (int(x) for x in steps.loc[rank].to_numpy()) if lane == 0 and rank in steps.index else (0, 0)
        )
        row: dict[str, Any] = {"rank": rank, "lane": lane, "role": str(run.attributes(rank).get("role", ""))}
        row |= {"time": time} | {kind: float(took[code]) for code, kind in enumerate(KINDS, 1)}
        row |= {"unaccounted": time - float(took.sum()), "steps": count, "samples": samples}
        rows.append(row | {"rate": samples / time if time > 0 else 0.0})
    return pd.DataFrame(rows)


def format_totals(run: Run) -> str:
    """The totals as a text table: two lines per rank, seconds and below them the share of the rank's time."""
    frame = sum_times(run)
    kinds = [kind for kind in KINDS if (frame[kind] > 0).any()] + ["unaccounted"]
    head = ["rank", "role", "time s", *kinds, "steps", "samples", "samples/s"]
    lines = [head]
    for row in frame.to_dict("records"):
        name = str(row["rank"]) if row["lane"] == 0 else f"{row['rank']}+"
        role = row["role"] if row["lane"] == 0 else "server thread"
        counts = (
            [str(row["steps"]), str(row["samples"]), f"{row['rate']:.1f}"] if row["lane"] == 0 else [""] * 3
        )
        lines.append([name, role, f"{row['time']:.3f}", *(f"{row[kind]:.3f}" for kind in kinds), *counts])
        shares = [f"{100 * row[kind] / row['time']:.1f} %" if row["time"] > 0 else "" for kind in kinds]
        lines.append(["", "", "", *shares, "", "", ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [_line(line, widths) for line in lines]
    text += [f"note: {note}" for note in run.notes]
    return "\n".join(text)


def _line(cells: list[str], widths: list[int]) -> str:
    left = {1}  # the role
    aligned = (
        c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(aligned).rstrip()
