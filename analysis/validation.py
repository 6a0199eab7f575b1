"""Predictions beside measurements in the laboratory, which needs root. Writes docs/validation.md.

    python analysis/validation.py                 measure what docs/validation.json lacks, predict, write the page
    python analysis/validation.py --only diloco   only the cases whose names have that in them
    python analysis/validation.py --again         measure anew
    python analysis/validation.py --predict       predict all cases anew, and write the page

A case is trained on hosts of the laboratory; what its steps took is compared with what `hpctrain simulate` predicts
from one calibration (docs/validation.calibration.toml), which comes from the traces of runs on two hosts at 100 Mbit/s,
as `hpctrain calibrate RUN ...` makes it. To make that anew, delete it. MNIST must be in data/mnist (or below
HPCTRAIN_DATA). About half a minute for each case; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description
from hpctrain.job import Job
from hpctrain.lab import command
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.command import calibration_of_folders
from hpctrain.simulate.simulation import Simulation
from hpctrain.simulate.summary import predict
from hpctrain.trace import open_run

ROOT = Path(__file__).parent.parent
JOB, STEPS, WARM = ROOT / "jobs" / "study_mnist.toml", 240, 0.3
DOCUMENT, KEPT = ROOT / "docs" / "validation.md", ROOT / "docs" / "validation.json"
CALIBRATION = ROOT / "docs" / "validation.calibration.toml"
QUICK = ["threads=1", "train.batch_size=64", f"train.steps={STEPS}", "train.evaluate_every={fraction=1.0}"]
RUNS, SAMPLED = 2, "trace.resources_seconds=0.2"
Kept = dict[str, dict[str, float]]
HEAD = """# Predicted beside measured

Remade by `python analysis/validation.py` (as root, for the laboratory's hosts). LeNet-5 on MNIST, 64 samples per worker
and step; {steps} steps or fewer, of which the first {warm:.0%} do not count. *Measured*: the median over workers of the
mean step, from the run's traces, in the faster of two runs (other work on the machine can only slow them). *Predicted*:
by `hpctrain simulate`. A host of 0.5 cores gets half the time of a core in every 10 ms; all hosts share two cores.

The calibration comes from the traces of {count} runs on two hosts of half a core at 100 Mbit/s: the first table. The
second one has other numbers of hosts, other links and hosts, with the same calibration. Two numbers in it come from
none of these runs: `turns` is an estimate, and `seniority` was chosen so that the servers' cases come out.
"""
VERDICT = """
Over {count} cases the median difference is {median:.0f} %, the largest {largest:.0f} % (wanted: 5 and 15 %).
"""


@dataclass(frozen=True)
class Trial:
    """A job on a cluster. `hosts`: the rows of [[hosts]]; `mbit`: of each link; `keys`: of the job."""

    name: str
    hosts: tuple[dict[str, Any], ...]
    mbit: float
    keys: tuple[str, ...]

    @property
    def cluster(self) -> Description:
        """The cluster of the laboratory and of the simulator."""
        return Description.model_validate(
            {"name": "trial", "hosts": list(self.hosts), "link": {"mbit_per_s": self.mbit}, "machine_cores": 2}
        )

    def job(self, output: str) -> Job:
        """What is trained."""
        return Job.load(JOB, [*QUICK, *self.keys, f"output={output}"])


def half(count: int, cores: float = 0.5, ranks: int = 1) -> dict[str, Any]:
    """Equal hosts that share two cores."""
    return {"count": count, "cores": cores, "ranks": ranks}


LOCAL = ("strategy=local_sgd", "strategy.every=8")
SYNC = ("strategy=parameter_server", "strategy.mode=sync")
ASYNC = ("strategy=parameter_server", "strategy.mode=async")
SHORT, SHORTER = "train.steps=100", "train.steps=50"
CALIBRATED = tuple(
    Trial(f"{name}, 2 hosts, 100 Mbit/s", (half(2),), 100.0, keys)
    for name, keys in {
        "all_reduce": ("strategy=all_reduce",),
        "all_reduce by messages": ("strategy=all_reduce", "strategy.exchange=message"),
        "local_sgd": LOCAL,
        "bfloat16": ("strategy.codec=bfloat16",),
        "int8": ("strategy.codec=int8",),
        "topk": ("strategy.codec=topk",),
        "powersgd": ("strategy.codec=powersgd",),
        "async server": ASYNC,
    }.items()
)
TRIALS = (
    Trial("all_reduce, 2 hosts, 1 Gbit/s", (half(2),), 1000.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy=all_reduce", SHORTER)),
    Trial("all_reduce, 3 hosts, 100 Mbit/s", (half(3),), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 4 hosts, 100 Mbit/s", (half(4, 0.4),), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy=all_reduce", SHORTER)),
    Trial("all_reduce, one of 2 hosts at half speed", (half(1), half(1, 0.25)), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 2 ranks on each of 2 hosts", (half(2, 0.5, 2),), 100.0, ("strategy=all_reduce",)),
    Trial("bfloat16, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy.codec=bfloat16", SHORTER)),
    Trial("int8, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy.codec=int8", SHORT)),
    Trial("int8, 4 hosts, 100 Mbit/s", (half(4, 0.4),), 100.0, ("strategy.codec=int8",)),
    Trial("topk, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy.codec=topk",)),
    Trial("powersgd, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy.codec=powersgd",)),
    Trial("local_sgd, 2 hosts, 10 Mbit/s", (half(2),), 10.0, LOCAL),
    Trial("local_sgd, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, LOCAL),
    Trial("local_sgd, 4 hosts, 100 Mbit/s", (half(4, 0.4),), 100.0, LOCAL),
    Trial("sync server, 3 hosts, 100 Mbit/s", (half(3),), 100.0, SYNC),
    Trial("sync server, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, (*SYNC, "train.steps=25")),
    Trial("async server, 3 hosts, 100 Mbit/s", (half(3),), 100.0, ASYNC),
    Trial("async server, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, (*ASYNC, SHORTER)),
)


def measured(trial: Trial, keep: Path) -> float:
    """Seconds per step in the laboratory, of the faster of two runs, whose folder is kept there. Raises ClusterError if
    a run fails."""
    found = []
    for attempt in range(RUNS):
        folder = keep / f"{attempt}"
        folder.mkdir(parents=True)
        file = folder / "cluster.toml"
        group = "\n".join(f"[[hosts]]\n{_keys(row)}" for row in trial.hosts)
        file.write_text(f'name = "trial"\n{group}\n[link]\nmbit_per_s = {trial.mbit}\n')
        words = [str(JOB), *QUICK, *trial.keys, f"output={folder}/runs", "trace.report=false", SAMPLED]
        status = command.run(file, [sys.executable, "-m", "hpctrain", "train", *words], None)
        runs = list(folder.glob("runs/*"))
        if status or len(runs) != 1:
            raise ClusterError(f"validation: {trial.name} ended with status {status}")
        steps = open_run(runs[0]).steps()
        found.append((median(_mean_interval(group["t_s"].tolist()) for _, group in steps.groupby("rank")), runs[0]))
    seconds, best = min(found)
    best.rename(keep / "best")
    return seconds


def _mean_interval(ends: list[float]) -> float:
    first = int(WARM * len(ends))
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def _keys(row: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {value}" for key, value in row.items())


def predicted(trial: Trial, known: Calibration) -> float:
    """Seconds per step that the simulator says."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-validation-") as folder:
        job = trial.job(folder).override(["trace.enabled=false"])
        return predict(Simulation(job, trial.cluster).run(known), known).step


def calibrated(kept: Kept) -> Calibration:
    """The calibration, from runs on two hosts, whose measurements are kept."""
    if CALIBRATION.exists():
        return Calibration.load(CALIBRATION)
    with tempfile.TemporaryDirectory(prefix="hpctrain-validation-") as folder:
        for number, trial in enumerate(CALIBRATED):
            kept.setdefault(trial.name, {})["measured"] = measured(trial, Path(folder) / f"{number}")
        best = [Path(folder) / f"{number}" / "best" for number in range(len(CALIBRATED))]
        found = calibration_of_folders(best, CALIBRATED[0].cluster)
    found.save(CALIBRATION)
    return found


def page(kept: Kept) -> Iterator[str]:
    """The lines of docs/validation.md."""
    yield HEAD.format(steps=STEPS, warm=WARM, count=len(CALIBRATED))
    for trials in (CALIBRATED, TRIALS):
        rows, errors = [], []
        for trial in trials:
            if "predicted" not in kept.get(trial.name, {}):
                continue
            real, said = kept[trial.name]["measured"], kept[trial.name]["predicted"]
            errors.append(100 * abs(said / real - 1))
            rows.append([trial.name, f"{1e3 * real:.1f}", f"{1e3 * said:.1f}", f"{100 * (said / real - 1):+.0f} %"])
        yield "| case | measured, ms | predicted, ms | difference |"
        yield "|---|---|---|---|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        if errors:
            yield VERDICT.format(count=len(errors), median=median(errors), largest=max(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args()
    kept: Kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    known = calibrated(kept)
    for trial in (*CALIBRATED, *TRIALS):
        if options.only not in trial.name:
            continue
        found = kept.setdefault(trial.name, {})
        if not options.predict and (options.again or "measured" not in found):
            with tempfile.TemporaryDirectory(prefix="hpctrain-validation-") as folder:
                found["measured"] = measured(trial, Path(folder))
        if "measured" in found:
            found["predicted"] = predicted(trial, known)
            print(f"{trial.name}: measured {found['measured']:.4f} s, predicted {found['predicted']:.4f} s", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    DOCUMENT.write_text("\n".join(page(kept)).rstrip() + "\n")


if __name__ == "__main__":
    main()
