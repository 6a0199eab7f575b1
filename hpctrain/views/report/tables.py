"""The page's tables: lists of strings made from the frames of the analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.trace.schema import KINDS, THREADS

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace import Run

MOST_CELLS = 16  # ranks; up to this many, the waiting matrix is a full table and times are shown by rank
MOST_NAMED = 8  # phases listed among the facts
MOST_PHASES = 40  # in a table
LIBRARIES = ("torch", "mpi4py", "numpy")


@dataclass(frozen=True)
class PageTable:
    """Headings and rows of text. `shades`: how dark each cell is (0 to 1), if used; `texts`: the columns (from 0) that
    hold words instead of numbers.
    """

    heads: list[str]
    rows: list[list[str]]
    shades: list[list[float]] | None = None
    note: str = ""
    texts: tuple[int, ...] = ()


# -- facts -------------------------------------------------------------------------------------------------------
def facts(run: Run, phases: pd.DataFrame | None) -> list[tuple[str, str]]:
    """(name, value) pairs that describe the run."""
    about = {rank: run.attributes(rank) for rank in run.ranks}
    found = [("ranks", f"{run.size}" + (f" ({len(run.ranks)} of them traced)" if len(run.ranks) < run.size else ""))]
    hosts = sorted({str(facts.get("host", "")) for facts in about.values()} - {""})
    nodes = len({facts.get("node", 0) for facts in about.values()})
    found.append(("nodes", f"{nodes}" + (f" ({listed(hosts)})" if hosts else "")))
    found += [("strategy", text) for text in _strategies(phases)]
    found.append(("devices", listed(sorted({str(facts.get("device", "cpu")) for facts in about.values()}))))
    parameters = about[run.ranks[0]].get("parameters")
    if parameters is not None:
        found.append(("parameters", f"{int(parameters):,}"))
    found += _work(run)
    if len(run.attempts) > 1:
        times = len(run.attempts) - 1
        found.append(("attempts", f"{len(run.attempts)} (resumed {times} time{'s' * (times > 1)})"))
    first = about[run.ranks[0]]
    versions = [f"{name} {first[name]}" for name in LIBRARIES if first.get(name)]
    found.append(("software", listed([f"Python {first['python']}" if first.get("python") else "", *versions])))
    found.append(("MPI", str(first.get("mpi", "")).strip()))
    return [(name, value) for name, value in found if value]


def _strategies(phases: pd.DataFrame | None) -> list[str]:
    if phases is None or not len(phases):
        return []
    found = []
    last = phases[phases["attempt"] == phases.groupby("phase")["attempt"].transform("max")]
    shown = set(sorted(last["phase"].unique())[:MOST_NAMED])
    others = last["phase"].nunique() - len(shown)
    last = last[last["phase"].isin(shown)]
    for phase, part in last.groupby("phase"):
        roles = part.groupby("role")["rank"].nunique().sort_index(ascending=False)  # workers before servers
        who = " and ".join(f"{count} {role}{'s' * (count > 1)}" for role, count in roles.items())
        found.append(f"phase {phase}: {part['strategy'].iloc[0]}, {who}")
    return [*found, f"and {others:,} more phases"] if others else found


def _work(run: Run) -> list[tuple[str, str]]:
    """Steps, samples and seconds, as far as known from /steps."""
    steps = run.steps()
    if not len(steps):
        return [("steps", "none finished")]
    last, cursor = int(steps["step"].max()) + 1, int(steps["cursor"].max())
    found = [("steps", f"at most {last:,} per worker, {len(steps):,} in total")]
    if cursor >= 0:
        found.append(("samples", f"{cursor:,}"))
    return [*found, ("time", f"{steps['t_s'].max():.1f} s from the first span to the end of the last step")]


def listed(names: list[str]) -> str:
    """At most six names, and the number of others."""
    names = [name for name in names if name]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# -- efficiency and times ----------------------------------------------------------------------------------------
TERMS = ("parallel_efficiency", "load_balance", "communication_efficiency")


def efficiency(frame: pd.DataFrame) -> PageTable | None:
    """A row per phase, in percent; if there are very many, the longest phases."""
    if not len(frame):
        return None
    longest = frame.nlargest(MOST_PHASES, "seconds").sort_values("phase")
    note = f"The {len(longest)} longest of {len(frame):,} phases." if len(longest) < len(frame) else ""
    rows = [
        [f"{row['phase']}", str(row["strategy"]), f"{int(row['workers'])}", f"{row['seconds']:.2f}"]
        + [percent(row[term]) for term in TERMS]
        for row in longest.to_dict("records")
    ]
    heads = ["phase", "strategy", "workers", "seconds", *(term.replace("_", " ") for term in TERMS)]
    return PageTable(heads, rows, note=note, texts=(1,))


def times(frame: pd.DataFrame) -> PageTable | None:
    """A row per phase and rank: its seconds by span kind. For many ranks: means per phase and role. If there are very
    many phases, the longest."""
    if not len(frame):
        return None
    took, all_phases = frame.groupby("phase")["total_s"].max(), frame["phase"].nunique()
    frame = frame[frame["phase"].isin(took.nlargest(MOST_PHASES).index)]
    note = f"The {MOST_PHASES} longest of {all_phases:,} phases." if all_phases > MOST_PHASES else ""
    kinds = [kind for kind in KINDS if kind in frame and (frame[kind] > 0).any()]
    numbers = [*kinds, "total_s"]
    many = frame["rank"].nunique() > MOST_CELLS
    frame = frame.assign(role=frame["lane"].map(THREADS).fillna(frame["role"]))
    if many:
        counts = frame.groupby(["phase", "role"])["rank"].nunique()
        frame = frame.groupby(["phase", "role"], as_index=False)[numbers].mean()
        who = [f"mean of {counts[phase, role]}" for phase, role in zip(frame["phase"], frame["role"], strict=True)]
    else:
        who = [str(rank) for rank in frame["rank"]]
    rows = [
        [str(row["phase"]), rank, str(row["role"])] + [f"{row[name]:.2f}" for name in numbers]
        for rank, row in zip(who, frame.to_dict("records"), strict=True)
    ]
    shades = [
        [0.0] * 3 + [row[kind] / row["total_s"] if row["total_s"] > 0 else 0.0 for kind in kinds] + [0.0]
        for row in frame.to_dict("records")
    ]
    return PageTable(["phase", "rank", "role", *kinds, "total"], rows, shades, note, texts=(2,))


def device_times(frame: pd.DataFrame) -> PageTable | None:
    """A row per phase and rank: milliseconds per step on the device and on the host, by span kind. If there are very
    many, means over the ranks."""
    if not len(frame):
        return None
    error = float(frame["error_us"].median())
    if frame["rank"].nunique() > MOST_CELLS:
        frame = frame.groupby(["phase", "kind"], as_index=False).mean(numeric_only=True).assign(rank="mean")
    kinds = [kind for kind in KINDS if (frame["kind"] == kind).any()]
    rows = []
    for (phase, rank), own in list(frame.groupby(["phase", "rank"]))[: MOST_PHASES * MOST_CELLS]:
        cells = own.set_index("kind")[["device_ms_per_step", "host_ms_per_step"]].reindex(kinds).to_numpy().ravel()
        rows.append([str(phase), str(rank), *("–" if cell != cell else f"{cell:.3f}" for cell in cells)])
    heads = ["phase", "rank", *(f"{kind}, {where}" for kind in kinds for where in ("device", "host"))]
    note = f"Their place on the host's clock is known to about {error:.0f} µs, if the clocks drift little."
    return PageTable(heads, rows, note=note)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == share else "–"


# -- waiting -----------------------------------------------------------------------------------------------------
def waiting(matrix: pd.DataFrame) -> PageTable | None:
    """Seconds that each rank waited for each other rank; for many ranks only the largest entries."""
    if not matrix.size or not float(np.nansum(matrix.to_numpy())) > 0:
        return None
    if len(matrix) > MOST_CELLS:
        return _largest(matrix)
    values = np.nan_to_num(matrix.to_numpy(dtype=float))
    rows = [
        [_rank(rank), *(f"{value:.2f}" if value > 0 else "·" for value in line), f"{line.sum():.2f}"]
        for rank, line in zip(matrix.index, values, strict=True)
    ]
    shades = [[0.0, *(line / values.max()), 0.0] for line in values]
    heads = ["waiting ↓ for →", *(_rank(rank).removeprefix("rank ") for rank in matrix.columns), "total"]
    return PageTable(heads, rows, shades)


def _largest(matrix: pd.DataFrame) -> PageTable:
    values = np.nan_to_num(matrix.to_numpy(dtype=float))
    largest = [np.unravel_index(i, values.shape) for i in np.argsort(-values, axis=None)[:MOST_CELLS]]
    rows = [
        [_rank(matrix.index[i]), _rank(matrix.columns[j]), f"{values[i, j]:.2f}"]
        for i, j in largest
        if values[i, j] > 0
    ]
    return PageTable(["waiting", "for", "seconds"], rows, note=f"The {len(rows)} largest of {matrix.size:,}.")


def _rank(rank: Any) -> str:
    return f"rank {rank}" if int(rank) >= 0 else "unknown"


# -- traffic -----------------------------------------------------------------------------------------------------
def traffic(frame: pd.DataFrame) -> PageTable | None:
    """A row per rank: what it sent and received, in MB, by messages, of these between nodes, and by collectives of the
    MPI library. For many ranks: a row per node, with sums."""
    numbers = [str(name) for name in frame.columns if name not in ("rank", "node")]
    if not len(frame) or not frame[numbers].to_numpy().any():
        return None
    numbers = [name for name in numbers if frame[name].any()]
    by_node = len(frame) > MOST_CELLS
    if by_node:
        frame = frame.groupby("node", as_index=False)[numbers].sum()
    heads = ["node"] if by_node else ["rank", "node"]
    rows = [
        [*(str(row[name]) for name in heads), *(f"{row[name] / 1e6:.4g}" for name in numbers)]
        for row in frame.to_dict("records")
    ]
    note = ""
    if "collective" in numbers:
        note = (
            "collective: the buffers that ranks give to the MPI library's all-reduces and all-gathers; what they "
            "receive of them is at least that much, as in a ring."
        )
    return PageTable([*heads, *(f"{VOLUMES[name]}, MB" for name in numbers)], rows, note=note)


VOLUMES = {
    "sent": "sent",
    "received": "received",
    "sent_between": "sent to other nodes",
    "received_between": "received from other nodes",
    "collective": "collective",
    "collective_received": "received of it",
}


# -- results -------------------------------------------------------------------------------------------------------
def metrics(run: Run) -> PageTable | None:
    """The last evaluations of each split in metrics.csv."""
    frame = run.metrics()
    if not len(frame):
        return None
    heads = [str(name) for name in frame.columns]
    last = frame.groupby("split", sort=False).tail(1) if "split" in frame else frame.tail(1)
    best = _best(run, frame)
    rows = [[_number(value) for value in row] for row in last.itertuples(index=False)]
    note = f"The last of {len(frame)} evaluations. {best}".strip()
    texts = tuple(i for i, head in enumerate(heads) if head == "split")
    return PageTable(heads, rows, note=note, texts=texts)


def _best(run: Run, frame: pd.DataFrame) -> str:
    if "split" not in frame or "loss" not in frame or not frame["loss"].notna().any():
        return ""
    row = frame.sort_values("loss").iloc[0]
    return f"Lowest loss: {row['loss']:.4g} ({row['split']}, step {row['step']})."


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.5g}"
    return str(value)
