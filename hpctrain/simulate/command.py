"""The commands `hpctrain simulate` and `hpctrain calibrate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description, nodes
from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.curve import Curve
from hpctrain.simulate.flops import counted
from hpctrain.simulate.measure import measure
from hpctrain.simulate.runs import RealRun, calibration_of
from hpctrain.simulate.simulation import Simulation
from hpctrain.simulate.summary import lines, predict
from hpctrain.trace import open_run

STEPS, ROUNDS = 50, 6  # simulated without --learn, at least
MEASURED = 4  # ranks that a measurement takes, where the job can run on so few


def simulate(
    job: Job,
    cluster: Path,
    ranks: int | None,
    calibration: Path | None,
    learn: bool,
    steps: int | None,
    curve: Path | None,
) -> int:
    """Predict what `job` does on that cluster, and print it. Raises HpctrainErrors."""
    if curve is not None and (learn or steps is not None):
        raise ClusterError(
            f"--curve {curve}: that run's losses stand for those that --learn computes, and decide how many rounds "
            "there are; leave --learn and --steps out"
        )
    described = Description.load(cluster)
    places = nodes(described.each(), ranks)
    if steps is not None and steps < 1:
        raise ClusterError(f"--steps {steps}: at least 1 is needed")
    followed = Curve.of(curve, job) if curve is not None else None
    if steps is None:
        steps = usual_steps(job, learn or followed is not None)
    simulation = Simulation(job, described, ranks, learn, steps, followed)
    if calibration is not None:
        known = Calibration.load(calibration)
    else:
        print("measuring some steps of the job on this machine ...", flush=True)
        known = measure_job(job, places)
    began = time.monotonic()
    found = simulation.run(known)
    depth, size = "with gradients" if learn else "costs only", len(places)
    if curve is not None:
        depth = f"costs only, with the losses of {curve}"
    print(f"{job.name} on {described.summary()}; {size} rank{'s' * (size > 1)}; {depth}; calibration: {known.source}")
    if any(host.devices for host in described.each()):
        print("  note: computing times are those of a core of the calibrated machine, times the hosts' `speed`")
    if not learn and curve is None and (job.train.target is not None or job.train.patience is not None):
        print("  note: train.target and train.patience do not stop it; with --curve RUN they would")
    if found.from_flops:
        print(
            f"  note: the calibration is of {known.model.name}; what {job.model.name} takes was predicted from its "
            f"flops, +- {100 * known.error_other_model:.0f} % of computing"
        )
    if found.loops:
        print("  note: all-reduces that overlap were computed as loops, and may end up to a fifth too early")
    for line in lines(found, predict(found, known)):
        print(f"  {line}")
    print(f"simulated {found.seconds:.3g} s in {time.monotonic() - began:.3g} s; run folder {found.folder}")
    return 0


def calibrate_here(job: Job, cluster: Path | None, output: Path) -> int:
    """Measure steps of `job` on this machine, and write what they cost. Raises HpctrainErrors."""
    places: Sequence[int] = (0, 0, 1, 1)
    if cluster is not None:
        places = nodes(Description.load(cluster).each(), None)
    with_work(measure_job(job, places), job).save(output)
    print(f"wrote {output}")
    return 0


def calibrate_from(folders: Sequence[Path], cluster: Path | None, output: Path) -> int:
    """Write what the traces of real runs say of computing and messages. `cluster`: where they ran. Raises
    HpctrainErrors."""
    described = Description.load(cluster) if cluster is not None else None
    calibration_of_folders(folders, described).save(output)
    print(f"wrote {output}")
    return 0


def calibration_of_folders(folders: Sequence[Path], cluster: Description | None) -> Calibration:
    """From run folders. `cluster`: where the runs were, None: not known. Raises HpctrainErrors."""
    runs = [RealRun.of(open_run(folder)) for folder in folders]
    if len({str(each.job.model.plain()) for each in runs}) > 1:
        raise ClusterError(f"{folders[0]} and others are of different models; calibrate each model by itself")
    first = runs[0].job
    print("measuring some steps of the first run's job on this machine ...", flush=True)
    return calibration_of(runs, with_work(measure_job(first, (0, 0, 1, 1)), first), cluster)


def usual_steps(job: Job, whole: bool) -> int | None:
    """How many rounds to simulate if nothing is said: all (`whole`, or of several phases), or as many as show what a
    step costs."""
    if whole or len(job.schedule) > 1:
        return None
    every = getattr(job.schedule[0].strategy.options, "every", 1)
    if not isinstance(every, int):
        return None
    return max(-(-STEPS // every), ROUNDS) * every


def measure_job(job: Job, places: Sequence[int]) -> Calibration:
    """What steps of the job cost, measured on a few virtual ranks, whatever number of ranks it needs."""
    free = job.override(["ranks=default"]) if job.ranks is not None else job
    return measure(free, few(job, places))


def with_work(known: Calibration, job: Job) -> Calibration:
    """The calibration with the flops of the job's model, which costs of other models follow from, if they can be
    counted."""
    try:
        work = counted(job).work
    except ClusterError:
        return known
    return known.model_copy(update={"model": known.model.model_copy(update={"work": work})})


def few(job: Job, places: Sequence[int]) -> Sequence[int]:
    """Ranks for a measurement: as few as the job can run on, some of them on one node and some on another."""
    servers = max(getattr(phase.strategy.options, "servers", 0) for phase in job.schedule)
    wanted = max(MEASURED, servers + 2)
    chosen = [place for rank, place in enumerate(places) if places[:rank].count(place) < 2][:wanted]
    if len(chosen) < wanted:  # more of them on the same nodes
        chosen = list(places[:wanted])
    return chosen if len(chosen) > 1 else [0, 0]
