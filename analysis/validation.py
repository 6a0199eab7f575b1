"""Predictions beside measurements in the laboratory, which needs root. Writes docs/validation.md.

    python analysis/validation.py                 measure what docs/validation.json lacks, predict, write the page
    python analysis/validation.py --only diloco   only the cases whose names have that in them
    python analysis/validation.py --again         measure anew
    python analysis/validation.py --predict       predict all cases anew, and write the page

A case is trained on hosts of the laboratory; what its steps took is compared with what `hpctrain simulate` predicts
from a calibration that was measured once, on one core, without any network (docs/validation.calibration.toml). MNIST
must be in data/mnist (or below HPCTRAIN_DATA). About half a minute for each case; nothing else should run meanwhile.
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
from hpctrain.simulate.measure import measure
from hpctrain.simulate.simulation import Simulation
from hpctrain.simulate.summary import predict
from hpctrain.trace import open_run

ROOT = Path(__file__).parent.parent
JOB, STEPS, WARM = ROOT / "jobs" / "study_mnist.toml", 240, 0.3
DOCUMENT, KEPT = ROOT / "docs" / "validation.md", ROOT / "docs" / "validation.json"
CALIBRATION = ROOT / "docs" / "validation.calibration.toml"
QUICK = ["threads=1", "train.batch_size=64", f"train.steps={STEPS}", "train.evaluate_every={fraction=1.0}"]
HEAD = """# Predicted beside measured

Remade by `python analysis/validation.py` (as root, for the laboratory's hosts). LeNet-5 on MNIST, 64 samples per worker
and step; {steps} steps or fewer, of which the first {warm:.0%} do not count. *Measured*: the median over workers of the
mean step, from the run's traces. *Predicted*: by `hpctrain simulate` from one calibration, measured on one core without
a network. A host of 0.5 cores gets half the time of a core in every 10 ms.

{verdict}

Not in the predictions, and part of what is missing: the hosts of the laboratory share two cores, which four hosts use
at the same time, so that they slow each other; the processor time that messages take; and what TCP loses where 10
Mbit/s are full in both directions. Messages that share a link with perfect fairness keep the workers of an asynchronous
server in phase; real ones fall out of it, and use both directions of the link.
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
            {"name": "trial", "hosts": list(self.hosts), "link": {"mbit_per_s": self.mbit}, "machine_cores": 2.0}
        )

    def job(self, output: str) -> Job:
        """What is trained."""
        return Job.load(JOB, [*QUICK, *self.keys, f"output={output}"])


def half(count: int, cores: float = 0.5, ranks: int = 1) -> dict[str, Any]:
    """Equal hosts that share two cores."""
    return {"count": count, "cores": cores, "ranks": ranks}


LOCAL = ("strategy=local_sgd", "strategy.every=8")
SERVER = ("strategy=parameter_server", "strategy.mode=async")
TRIALS = (
    Trial("all_reduce, 2 hosts, 1 Gbit/s", (half(2),), 1000.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 2 hosts, 100 Mbit/s", (half(2),), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy=all_reduce", "train.steps=60")),
    Trial("all_reduce, 3 hosts, 100 Mbit/s", (half(3),), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 4 hosts, 100 Mbit/s", (half(4, 0.4),), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy=all_reduce", "train.steps=60")),
    Trial("all_reduce, one of 2 hosts at half speed", (half(1), half(1, 0.25)), 100.0, ("strategy=all_reduce",)),
    Trial("all_reduce, 2 ranks on each of 2 hosts", (half(2, 0.5, 2),), 100.0, ("strategy=all_reduce",)),
    Trial("bfloat16, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy.codec=bfloat16", "train.steps=60")),
    Trial("powersgd, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, ("strategy.codec=powersgd", "train.steps=120")),
    Trial("topk, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy.codec=topk", "train.steps=120")),
    Trial("int8, 2 hosts, 10 Mbit/s", (half(2),), 10.0, ("strategy.codec=int8", "train.steps=120")),
    Trial("local_sgd, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, LOCAL),
    Trial("local_sgd, 4 hosts, 100 Mbit/s", (half(4, 0.4),), 100.0, LOCAL),
    Trial("sync server, 3 hosts, 100 Mbit/s", (half(3),), 100.0, ("strategy=parameter_server", "strategy.mode=sync")),
    Trial("async server, 3 hosts, 100 Mbit/s", (half(3),), 100.0, SERVER),
    Trial("async server, 4 hosts, 10 Mbit/s", (half(4, 0.4),), 10.0, (*SERVER, "train.steps=80")),
)


def measured(trial: Trial) -> float:
    """Seconds per step in the laboratory. Raises ClusterError if the run fails."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-validation-") as folder:
        file = Path(folder) / "cluster.toml"
        group = "\n".join(f"[[hosts]]\n{_keys(row)}" for row in trial.hosts)
        file.write_text(f'name = "trial"\n{group}\n[link]\nmbit_per_s = {trial.mbit}\n')
        words = [str(JOB), *QUICK, *trial.keys, f"output={folder}/runs", "trace.report=false"]
        status = command.run(file, [sys.executable, "-m", "hpctrain", "train", *words], None)
        runs = list(Path(folder).glob("runs/*"))
        if status or len(runs) != 1:
            raise ClusterError(f"validation: {trial.name} ended with status {status}")
        steps = open_run(runs[0]).steps()
        return median(_mean_interval(group["t_s"].tolist()) for _, group in steps.groupby("rank"))


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


def calibrated(trials: tuple[Trial, ...]) -> Calibration:
    """One calibration for all cases: of all strategies and codecs, each on one core."""
    if CALIBRATION.exists():
        return Calibration.load(CALIBRATION)
    known: Calibration | None = None
    for keys in dict.fromkeys(tuple(key for key in trial.keys if key.startswith("strategy")) for trial in trials):
        found = measure(Job.load(JOB, [*QUICK, *keys]), [0, 0, 1, 1])
        spans = {**found.spans, **(known.spans if known is not None else {})}
        known = (known or found).model_copy(update={"spans": spans})
    assert known is not None
    known.save(CALIBRATION)
    return known


def page(kept: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of docs/validation.md."""
    rows, errors = [], []
    for trial in TRIALS:
        if "predicted" not in kept.get(trial.name, {}):
            continue
        real, said = kept[trial.name]["measured"], kept[trial.name]["predicted"]
        errors.append(abs(said / real - 1))
        rows.append([trial.name, f"{1e3 * real:.1f}", f"{1e3 * said:.1f}", f"{100 * (said / real - 1):+.0f} %"])
    verdict = f"Over {len(errors)} cases the median error is {100 * median(errors):.0f} %, the largest "
    verdict += f"{100 * max(errors):.0f} % (wanted: 5 and 15 %)."
    yield HEAD.format(steps=STEPS, warm=WARM, verdict=verdict)
    yield "| case | measured, ms | predicted, ms | difference |"
    yield "|---|---|---|---|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args()
    kept: dict[str, dict[str, float]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    known = calibrated(TRIALS)
    for trial in TRIALS:
        if options.only not in trial.name:
            continue
        found = kept.setdefault(trial.name, {})
        if not options.predict and (options.again or "measured" not in found):
            found["measured"] = measured(trial)
        if "measured" in found:
            found["predicted"] = predicted(trial, known)
            print(f"{trial.name}: measured {found['measured']:.4f} s, predicted {found['predicted']:.4f} s", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    DOCUMENT.write_text("\n".join(page(kept)).rstrip() + "\n")


if __name__ == "__main__":
    main()
