"""The commands `hpctrain simulate` and `hpctrain calibrate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hpctrain.hosts import Description, nodes
from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.measure import measure
from hpctrain.simulate.simulation import Simulation
from hpctrain.simulate.summary import lines, predict

STEPS, ROUNDS = 50, 6  # simulated without --learn, at least
MEASURED = 4  # ranks that a measurement takes, where the job can run on so few


def simulate(
    job: Job, cluster: Path, ranks: int | None, calibration: Path | None, learn: bool, steps: int | None
) -> int:
    """Predict what `job` does on that cluster, and print it. Raises HpctrainErrors."""
    described = Description.load(cluster)
    places = nodes(described.each(), ranks)
    if calibration is not None:
        known = Calibration.load(calibration)
    else:
        print("measuring a step of the job on this machine ...", flush=True)
        known = measure(job, few(places))
    rounds = usual_steps(job, learn) if steps is None else steps
    simulation = Simulation(job, described, known, ranks, learn, rounds)
    began = time.monotonic()
    found = simulation.run()
    depth = "with gradients" if learn else "costs only"
    print(f"{job.name} on {described.summary()}; {len(places)} ranks; {depth}; calibration: {known.source}")
    for line in lines(found, predict(found, known)):
        print(f"  {line}")
    print(f"simulated {found.seconds:.3g} s in {time.monotonic() - began:.3g} s; run folder {found.folder}")
    return 0


def calibrate_here(job: Job, cluster: Path | None, output: Path) -> int:
    """Measure steps of `job` on this machine, and write what they cost. Raises HpctrainErrors."""
    places: Sequence[int] = (0, 0, 1, 1)
    if cluster is not None:
        places = nodes(Description.load(cluster).each(), None)
    measure(job, few(places)).save(output)
    print(f"wrote {output}")
    return 0


def usual_steps(job: Job, learn: bool) -> int | None:
    """How many rounds to simulate if nothing is said: all, or as many as show what a step costs."""
    if learn or len(job.schedule) > 1:
        return None
    every = getattr(job.schedule[0].strategy.options, "every", 1)
    if not isinstance(every, int):
        return None
    wanted = max(STEPS, ROUNDS * every)
    return wanted if job.train.steps is None else min(wanted, job.train.steps)


def few(places: Sequence[int]) -> Sequence[int]:
    """The first ranks of the first two nodes, for a measurement."""
    chosen = [place for place in places if place < 2]
    per_node = max(1, MEASURED // len(set(chosen)))
    kept = [p for n in sorted(set(chosen)) for p in [n] * min(per_node, chosen.count(n))]
    return kept if len(kept) > 1 else [0, *([1] if len(set(places)) > 1 else [0])]
