"""Where the time went: totals per rank and span kind, as a frame and as the text of `hpctrain trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.trace.reader import Run
from hpctrain.trace.schema import KINDS, THREADS, Kind

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = ("kind", "lane", "start_ns", "end_ns", "bytes", "peer", "id")
_NAME, _CELL = 11, 17  # column widths of the text


def sum_times(run: Run) -> pd.DataFrame:
    """A row per rank and lane: rank, lane, role, time, sent, received, span kinds ..., unaccounted, steps, samples,
    rate.

    Times are in seconds; `sent` and `received`: bytes of messages, without collectives of the MPI library; `rate` is
    in samples per second of the rank's time. `time`: from the rank's first span to the end of its last, summed over
    attempts; `unaccounted`: the part of it that no span covers. Lanes other than 0 (colocated servers) run in parallel
    with the rank's main thread: their time is not part of it. Repeated steps are counted once.
    """
    import pandas as pd

    sums: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    volumes: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    extents: dict[tuple[int, int, int], tuple[int, int]] = {}
    for rank, attempt, block in run.blocks("spans", columns=COLUMNS):
        lanes = np.unique(block["lane"]).tolist() if block["lane"].any() else [0]
        for lane in lanes:
            spans = block if len(lanes) == 1 else block[block["lane"] == lane]
            took = np.bincount(spans["kind"], (spans["end_ns"] - spans["start_ns"]) / 1e9, minlength=256)
            sums[rank, lane] = sums.get((rank, lane), 0.0) + took
            messages = spans[(spans["peer"] >= 0) & (spans["id"] >= 0)]
            moved = np.bincount(messages["kind"], messages["bytes"], minlength=256)
            volumes[rank, lane] = volumes.get((rank, lane), 0.0) + moved
            start, end = extents.get((rank, lane, attempt), (1 << 62, -(1 << 62)))
            bounds = min(start, int(spans["start_ns"].min())), max(end, int(spans["end_ns"].max()))
            extents[rank, lane, attempt] = bounds
    for rank in run.ranks:
        sums.setdefault((rank, 0), np.zeros(256))
    rows = []
    for (rank, lane), took in sorted(sums.items()):
        time = sum((b - a) / 1e9 for (r, n, _), (a, b) in extents.items() if (r, n) == (rank, lane))
        own = run.steps(rank)["samples"].to_numpy() if lane == 0 else np.zeros(0)
        count, samples = len(own), int(own.sum())
        row: dict[str, Any] = {"rank": rank, "lane": lane, "role": str(run.attributes(rank).get("role", ""))}
        moved = volumes.get((rank, lane), np.zeros(256))
        row |= {"time": time, "sent": int(moved[Kind.SEND]), "received": int(moved[Kind.RECV])}
        row |= {kind: float(took[code]) for code, kind in enumerate(KINDS, 1)}
        row |= {"unaccounted": time - float(took.sum()), "steps": count, "samples": samples}
        rows.append(row | {"rate": samples / time if time > 0 else 0.0})
    return pd.DataFrame(rows)


def format_totals(run: Run, width: int = 80) -> str:
    """The totals as text: a line per span kind, with each rank's seconds and their share of its time; then the notes.

    As many ranks are shown side by side as fit into `width` characters. "2+" is another thread of rank 2.
    """
    frame = sum_times(run)
    kinds = [kind for kind in KINDS if (frame[kind] > 0).any()] + ["unaccounted"]
    rows, many = frame.to_dict("records"), max(1, (width - _NAME) // _CELL)
    blocks = [_block(rows[i : i + many], kinds) for i in range(0, len(rows), many)]
    notes = "\n".join(f"note: {note}" for note in run.notes)
    return "\n\n".join([*blocks, notes] if notes else blocks)


def _block(rows: list[dict[Any, Any]], kinds: list[str]) -> str:
    own = [row["lane"] == 0 for row in rows]
    shared = ["" if mine else "+" for mine in own]
    lines = [("", [f"rank {row['rank']}{plus}" for row, plus in zip(rows, shared, strict=True)])]
    lines.append(("role", [THREADS.get(row["lane"], row["role"]) for row in rows]))
    lines.append(("seconds", [f"{row['time']:.3f}{'100.0 %' if row['time'] else '':>8}" for row in rows]))
    lines += [(kind, [_cell(row[kind], row["time"]) for row in rows]) for kind in kinds]
    for name in ("sent", "received"):
        if any(row[name] for row in rows):
            lines.append((f"{name} MB", [f"{row[name] / 1e6:.4g}" for row in rows]))
    for name, text in (("steps", "{steps}"), ("samples", "{samples}"), ("samples/s", "{rate:.1f}")):
        lines.append((name, [text.format(**row) if mine else "" for row, mine in zip(rows, own, strict=True)]))
    return "\n".join(
        f"{name:<{_NAME}}{''.join(f'{cell:>{_CELL}}' for cell in cells)}".rstrip() for name, cells in lines
    )


def _cell(seconds: float, time: float) -> str:
    share = f"{100 * seconds / time:.1f} %" if time > 0 else ""
    return f"{seconds:.3f}{share:>8}"
