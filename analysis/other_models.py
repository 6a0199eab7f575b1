"""Models that were never run beside models that were: what flops say of a model, and what was measured of it.

    python analysis/other_models.py

Prints the table of docs/simulation.md: the passes of each model, predicted from the calibration of each other one, over
measured. About a minute on one core; nothing else should run meanwhile. Needs MNIST and tinyshakespeare (data/, or
HPCTRAIN_DATA).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration, ModelCosts, ModelWork
from hpctrain.simulate.flops import counted, scaled
from hpctrain.simulate.measure import measure

JOBS = Path(__file__).parent.parent / "jobs"
MODELS = {
    "lenet5": ("study_mnist", ["train.batch_size=32"]),
    "mlp": ("study_mnist", ["model={name='mlp',inputs=784,hidden=[512,512]}", "train.batch_size=32"]),
    "convnet": ("digits", ["strategy=all_reduce"]),
    "resnet18, width 8": ("study_mnist", ["model={name='resnet18',channels=1,width=8}", "train.batch_size=32"]),
    "resnet18, width 32": ("study_mnist", ["model={name='resnet18',channels=1,width=32}"]),
    "transformer, width 64": ("study_char", []),
    "transformer, width 128": ("char_lm", ["strategy=all_reduce"]),
}


def seconds(model: ModelCosts, batch: int) -> float:
    """Of both passes."""
    return model.forward.seconds(batch) + model.backward.seconds(batch)


def predicted(known: ModelCosts, work: ModelWork, other: ModelWork, batch: int) -> float:
    """Seconds of both passes of a model that does `other`, by the costs of one that does `work`."""
    forward = scaled(known.forward, other.forward, work.forward)
    return forward.seconds(batch) + scaled(known.backward, other.backward, work.backward).seconds(batch)


def table(jobs: dict[str, Job], known: dict[str, Calibration]) -> Iterator[str]:
    """A row for each calibration, a column for each model."""
    works = {name: counted(job).work for name, job in jobs.items()}
    yield "| calibrated with | " + " | ".join(jobs) + " |"
    yield "|---" * (len(jobs) + 1) + "|"
    apart = list[float]()
    for row, calibration in known.items():
        cells = []
        for column, job in jobs.items():
            batch = job.train.batch_size
            taken = predicted(calibration.model, works[row], works[column], batch)
            ratio = taken / seconds(known[column].model, batch)
            cells.append("" if row == column else f"{ratio:.2f}")
            apart += [abs(ratio - 1.0)] if row != column else []
        yield f"| {row} | " + " | ".join(cells) + " |"
    near = sorted(apart)[2 * len(apart) // 3]
    yield f"\nMedian difference {median(apart):.0%}; two of three are within {near:.0%}; the largest {max(apart):.0%}."


def main() -> None:
    """Print it."""
    jobs = {name: Job.load(JOBS / f"{file}.toml", keys) for name, (file, keys) in MODELS.items()}
    known = {name: measure(job, [0, 0]) for name, job in jobs.items()}
    print("\n".join(table(jobs, known)))


if __name__ == "__main__":
    main()
