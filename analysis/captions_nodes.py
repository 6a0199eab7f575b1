"""Captions on several hosts of the laboratory (root): time against hosts and links, and what hosts use meanwhile.

    python analysis/captions_nodes.py features.h5          measure what docs/captions_nodes.json lacks, write the page
    python analysis/captions_nodes.py features.h5 --again  measure anew (--only TEXT: these)

The thesis that this workload comes from trained on hosts with links of 10 Mbit/s; every added host made it slower. Each
host here has one rank, half a core and a link of its own. Writes docs/captions_nodes.json, docs/captions_nodes.png, and
the tables of docs/captions.md between its marks. About 15 minutes; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.errors import ClusterError
from hpctrain.filenames import METRICS
from hpctrain.lab import command
from hpctrain.trace import open_run

ROOT = Path(__file__).parent.parent
JOB, DOCUMENT = ROOT / "jobs" / "captions.toml", ROOT / "docs" / "captions.md"
KEPT, PICTURE = ROOT / "docs" / "captions_nodes.json", ROOT / "docs" / "captions_nodes.png"
BEGIN, END = "<!-- captions_nodes: begin -->", "<!-- captions_nodes: end -->"
CORES, EPOCHS = 0.5, 2
LINKS = (10, 100, 1000)  # Mbit/s
COMPARED = 100  # Mbit/s, where times to the same loss are compared
SAMPLED = ("trace.resources_seconds=0.2", "trace.report=false", "threads=1", "train.keep_checkpoints=1")
ALL_REDUCE = ("strategy=all_reduce",)
POWERSGD = (*ALL_REDUCE, "strategy.codec=powersgd")
RARE = ("strategy.name=local_sgd", "strategy.every=4", "strategy.codec=powersgd")
STRATEGIES = {
    "all_reduce": ALL_REDUCE,
    "all_reduce, powersgd": POWERSGD,
    "local_sgd, every 4, powersgd": RARE,
}
RATE = "optimizer.lr=0.004"  # for all: of 0.001, 0.002, 0.004 and 0.008 the one that is fastest on one host and on four
LOCAL = ("strategy.name=local_sgd", "strategy.codec=int8", RATE)
TO_LOSS = {
    "one host": (1, (*ALL_REDUCE, RATE, "train.epochs=8")),
    "all_reduce": (4, (*ALL_REDUCE, RATE, "train.epochs=12")),
    "all_reduce, powersgd": (4, (*POWERSGD, RATE, "train.epochs=14")),
    "local_sgd, every 15, batch 16, int8": (4, (*LOCAL, "strategy.every=15", "train.batch_size=16", "train.epochs=14")),
    "local_sgd, every 15, batch 8, int8": (4, (*LOCAL, "strategy.every=15", "train.batch_size=8", "train.epochs=10")),
    "local_sgd, every 30, batch 8, int8": (4, (*LOCAL, "strategy.every=30", "train.batch_size=8", "train.epochs=10")),
}
COLOURS = {10: "#D55E00", 100: "#0072B2", 1000: "#009E73"}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """A run on that many hosts with links of `mbit` Mbit/s. `keys`: of the job."""

    name: str
    hosts: int
    mbit: int
    keys: tuple[str, ...]


def trials() -> Iterator[Trial]:
    """All of them. On one host nothing is sent, so one link is enough."""
    fixed = f"train.epochs={EPOCHS}"
    for name, keys in STRATEGIES.items():
        for hosts in (1, 2, 4):
            for mbit in LINKS if hosts > 1 else LINKS[-1:]:
                if hosts > 1 or keys is ALL_REDUCE:
                    yield Trial(titled(name, hosts, mbit), hosts, mbit, (*keys, fixed))
    for name, (hosts, keys) in TO_LOSS.items():
        yield Trial(f"to the same loss: {name}", hosts, COMPARED, keys)


def titled(name: str, hosts: int, mbit: int) -> str:
    """The name of a trial."""
    return f"{name}, {hosts} host{'s' * (hosts > 1)}, {mbit} Mbit/s"


def measured(trial: Trial, features: Path) -> dict[str, Any]:
    """Train in the laboratory: training seconds, the losses of the validations, and what the hosts used. Raises
    ClusterError if the run fails."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-captions-") as folder:
        cluster = Path(folder) / "cluster.toml"
        hosts = f"[[hosts]]\ncount = {trial.hosts}\ncores = {CORES}"
        cluster.write_text(f'name = "captions"\n{hosts}\n[link]\nmbit_per_s = {trial.mbit}\n')
        words = [str(JOB), f"data.file={features}", *trial.keys, *SAMPLED, f"output={folder}/runs"]
        status = command.run(cluster, [sys.executable, "-m", "hpctrain", "train", *words], None)
        runs = list(Path(folder).glob("runs/*"))
        if status or len(runs) != 1:
            raise ClusterError(f"captions: {trial.name} ended with status {status}")
        table = pd.read_csv(runs[0] / METRICS)
        course = table[table["split"] == "validation"]
        return {
            "seconds": float(table["seconds"].iloc[-1]),
            "course": course[["epoch", "seconds", "loss", "metric.BLEU-1", "metric.BLEU-4"]].to_dict("list"),
            "used": used(Analysis(open_run(runs[0]))),
        }


def used(analysis: Analysis) -> Rows:
    """Per host, means over training: percent of a core, MiB of memory (the most), Mbit/s out."""
    found = analysis.usage.groupby("node").agg(
        cpu=("cpu_percent", "mean"), memory=("resident_bytes", "max"), out=("net_out_bytes_per_s", "mean")
    )
    units = found.assign(memory=found["memory"] / 2**20, out=8e-6 * found["out"]).fillna(0.0).round(1)
    return [{str(key): float(value) for key, value in row.items()} for row in units.to_dict("records")]


# -- the page ------------------------------------------------------------------------------------------------------
def tables(kept: dict[str, Any]) -> Iterator[str]:
    """What is known, as Markdown."""
    yield f"Training seconds of {EPOCHS} epochs. Each host has one rank and {CORES:g} cores; batches of 32 per rank.\n"
    yield "| strategy | hosts | " + " | ".join(f"{mbit} Mbit/s" for mbit in LINKS) + " |"
    yield "|---|---|" + "---|" * len(LINKS)
    for name in STRATEGIES:
        for hosts in (1, 2, 4):
            cells = [_seconds(kept, name, hosts, mbit) for mbit in LINKS]
            if any(cells):
                yield f"| {name} | {hosts} | {' | '.join(cells)} |"
    yield f"\nUse of each host, all_reduce, {EPOCHS} epochs: percent of a core, MiB of memory, Mbit/s sent.\n"
    yield "| hosts | link, Mbit/s | processor, % | memory, MiB | sent, Mbit/s |"
    yield "|---|---|---|---|---|"
    for hosts in (1, 2, 4):
        for mbit in LINKS if hosts > 1 else LINKS[-1:]:
            rows = kept.get(titled("all_reduce", hosts, mbit), {}).get("used", [])
            columns = (", ".join(f"{row[key]:.0f}" for row in rows) for key in ("cpu", "memory", "out"))
            yield f"| {hosts} | {mbit if hosts > 1 else 'none'} | {' | '.join(columns)} |"
    yield from to_loss(kept)


def _seconds(kept: dict[str, Any], name: str, hosts: int, mbit: int) -> str:
    """A cell; the single host's is the same for all links."""
    if hosts == 1 and name != "all_reduce":
        return ""
    found = kept.get(titled(name, hosts, LINKS[-1] if hosts == 1 else mbit))
    return f"{found['seconds']:.1f}" if found is not None else ""


def to_loss(kept: dict[str, Any]) -> Iterator[str]:
    """Training seconds to the lowest validation loss of the first, one host, linear between evaluations."""
    courses = {name: kept.get(f"to the same loss: {name}", {}).get("course") for name in TO_LOSS}
    known = {name: course for name, course in courses.items() if course is not None}
    if not known:
        return
    target = min(next(iter(known.values()))["loss"])
    yield f"\nTraining seconds to the lowest validation loss that one host reaches, {target:.3f}; {COMPARED} Mbit/s.\n"
    yield "| | hosts | seconds | epochs | lowest loss |"
    yield "|---|---|---|---|---|"
    for name, course in known.items():
        seconds, epochs = (_reached(course, key, target) for key in ("seconds", "epoch"))
        cells = ["never", f"in {course['epoch'][-1]:.0f}"] if seconds is None else [f"{seconds:.1f}", f"{epochs:.1f}"]
        yield f"| {name} | {TO_LOSS[name][0]} | {' | '.join(cells)} | {min(course['loss']):.3f} |"


def _reached(course: dict[str, list[float]], clock: str, target: float) -> float | None:
    """The value of that clock when the loss first was at most `target`; None if it never was."""
    for place, loss in enumerate(course["loss"]):
        if loss <= target:
            if place == 0:
                return course[clock][0]
            before, share = course[clock][place - 1], course["loss"][place - 1]
            return before + (course[clock][place] - before) * (share - target) / (share - loss)
    return None


def drawn(kept: dict[str, Any]) -> Figure:
    """Left: time against hosts. Right: validation loss against time on hosts with links of COMPARED Mbit/s."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, name in zip(("-o", "--s", ":^"), STRATEGIES, strict=True):
        for mbit in LINKS:
            found = [(hosts, _seconds(kept, name if hosts > 1 else "all_reduce", hosts, mbit)) for hosts in (1, 2, 4)]
            there = {hosts: float(text) for hosts, text in found if text}
            times = list(there.values())
            left.plot(list(there), times, style, color=COLOURS[mbit], label=f"{name}, {mbit} Mbit/s")
    left.set_xticks([1, 2, 4])
    left.set_yscale("log")
    left.set_xlabel("hosts")
    left.set_ylabel(f"training time of {EPOCHS} epochs (s)")
    left.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for name, (hosts, _) in TO_LOSS.items():
        course = kept.get(f"to the same loss: {name}", {}).get("course")
        if course is not None:
            right.plot(course["seconds"], course["loss"], "-o", markersize=3, label=f"{name} ({hosts})")
    right.set_xlabel(f"training time, links of {COMPARED} Mbit/s (s)")
    right.set_ylabel("validation loss")
    right.set_xscale("log")
    for axis, places in ((left.yaxis, (2, 5, 10, 20, 50, 100)), (right.xaxis, (2, 5, 10, 20, 50))):
        axis.set_ticks(places, labels=list(map(str, places)))
        axis.set_ticks([], minor=True)
    right.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), title="strategy (hosts)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, metavar="FEATURES.h5")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="only trials whose names have that in them")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for trial in trials():
        if options.only in trial.name and (options.again or trial.name not in kept):
            kept[trial.name] = measured(trial, options.features.absolute())
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{trial.name}: {kept[trial.name]['seconds']:.1f} s", flush=True)
    drawn(kept).savefig(PICTURE, dpi=110)
    text = DOCUMENT.read_text()
    first, last = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOCUMENT.write_text(text[:first] + "\n" + "\n".join(tables(kept)) + "\n" + text[last:])


if __name__ == "__main__":
    main()
