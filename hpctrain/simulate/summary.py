"""What a simulation predicts, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev

from hpctrain.errors import ClusterError
from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.pauses import Pauses
from hpctrain.simulate.simulation import Simulated
from hpctrain.simulate.window import BEGIN

NETWORK_ERROR = 0.2  # relative, of the time in which ranks wait for messages: docs/validation.md


@dataclass(frozen=True)
class Prediction:
    """`step`: seconds that a worker takes for a step, median over workers; `error`: relative, one standard deviation;
    `rate`: samples per second of all workers; `whole`: seconds of the whole job, with its pauses; `computing`: each
    rank's share of time; `busiest`: (name, bytes per step, share of time in use) of the link that is used most; `sent`:
    bytes per step on all links; `staleness`: mean and maximum."""

    step: float
    error: float
    rate: float
    whole: float
    computing: dict[int, float]
    workers: list[int]
    busiest: tuple[str, float, float] | None
    sent: float
    staleness: tuple[float, int] | None

    @property
    def efficiency(self) -> float:
        """The share of the workers' time in which they compute."""
        return fmean(self.computing[rank] for rank in self.workers)


def predict(found: Simulated, calibration: Calibration) -> Prediction:
    """The figures of the stretch that the simulation ran. Raises ClusterError if it was too short for any."""
    rounds = {rank: found.tallies[rank].whole_rounds(BEGIN) for rank in found.workers}
    known = {rank: ends for rank, ends in rounds.items() if ends is not None}
    stretch = found.stretch
    if not known or stretch.seconds <= 0 or not stretch.steps:
        raise ClusterError("too few rounds were simulated to tell what a step costs; raise --steps, or train longer")
    taken = {rank: _seconds(found, rank, *ends) for rank, ends in known.items()}
    step = median(taken[rank] / (last - first) for rank, (first, last) in known.items())
    rate = sum(sum(found.tallies[r].samples[a + 1 : b + 1]) / taken[r] for r, (a, b) in known.items())
    computing = {rank: stretch.computing(rank) / stretch.seconds for rank in range(len(found.tallies))}
    share = fmean(computing[rank] for rank in found.workers)
    chance = _chance(found, *next(iter(known.items())))
    of_computing = calibration.error_other_model if found.from_flops else calibration.error
    error = math.hypot(share * of_computing, (1 - share) * NETWORK_ERROR, chance)
    links = {name: each for name, each in stretch.ports().items() if each[0] and not name.endswith("memory")}
    busiest = max(links.items(), key=lambda item: item[1][1], default=None)
    stale = [value for rank in found.workers for value in found.tallies[rank].staleness]
    trained = (max(found.tallies[rank].steps[-1] for rank in found.workers) - found.begun) / 1e9
    return Prediction(
        step,
        error,
        rate,
        trained + found.left / rate + found.pauses.seconds,
        computing,
        found.workers,
        (busiest[0], busiest[1][0] / stretch.steps, busiest[1][1]) if busiest is not None else None,
        sum(n for name, (n, _) in links.items() if name.endswith(" out")) / stretch.steps,
        (fmean(stale), max(stale)) if stale and max(stale) > 0 else None,
    )


def _seconds(found: Simulated, rank: int, first: int, last: int) -> float:
    steps = found.tallies[rank].steps
    return (steps[last] - steps[first]) / 1e9


def _chance(found: Simulated, rank: int, ends: tuple[int, int]) -> float:
    """The relative standard error of the mean, from how much this rank's rounds differ."""
    tally, (first, last) = found.tallies[rank], ends
    marks = [tally.steps[step] for step in range(first, last + 1) if tally.rounds[step]]
    taken = [b - a for a, b in pairwise(marks)]
    return stdev(taken) / fmean(taken) / math.sqrt(len(taken)) if len(taken) > 1 and fmean(taken) else 0.0


def lines(found: Simulated, predicted: Prediction) -> Iterator[str]:
    """The table that `hpctrain simulate` prints."""
    size, relative = len(found.tallies), predicted.error
    yield f"{'step':<20}{_time(predicted.step)} +- {_time(predicted.step * relative)}"
    yield f"{'samples per second':<20}{predicted.rate:,.0f} +- {predicted.rate * relative:,.0f}"
    finish = f"{_time(predicted.whole)} +- {_time(predicted.whole * relative)}"
    yield f"{'time to finish':<20}{finish}, without {_left_out(found.pauses)}"
    yield from _phases(found)
    yield from _paused(found.pauses)
    cost = predicted.whole * size
    yield f"{'cost':<20}{f'{cost:,.0f}' if cost >= 100 else f'{cost:.3g}'} rank-seconds"
    yield f"{'efficiency':<20}{100 * predicted.efficiency:.0f} % of the workers' time is computing"
    yield from _waiting(predicted, size)
    if predicted.busiest is not None:
        name, nbytes, used = predicted.busiest
        yield f"{'busiest link':<20}{name}: {_bytes(nbytes)} per step, in use {100 * used:.0f} % of the time"
        yield f"{'between hosts':<20}{_bytes(predicted.sent)} per step, all links together"
    if predicted.staleness is not None:
        mean, most = predicted.staleness
        yield f"{'staleness':<20}{mean:.1f} updates on average, at most {most}"


def _left_out(pauses: Pauses) -> str:
    """What the time to finish does not have, for a sentence."""
    parts = ["start-up"]
    parts += ["evaluations"] if pauses.evaluating is None else []
    parts += ["checkpoints"] if pauses.saving is None else []
    return ", ".join([*parts[:-2], " and ".join(parts[-2:])])


def _paused(pauses: Pauses) -> Iterator[str]:
    if pauses.evaluations:
        takes = "of a data set of unknown length" if pauses.evaluating is None else f"in {_time(pauses.evaluating)}"
        yield f"{'evaluations':<20}{pauses.evaluations} {takes}"
    takes = "the calibration does not say in what time" if pauses.saving is None else f"in {_time(pauses.saving)}"
    yield f"{'checkpoints':<20}{pauses.checkpoints}{', ' if pauses.saving is None else ' '}{takes}"


def _phases(found: Simulated) -> Iterator[str]:
    """Where rules have ended phases, and evaluations training."""
    if len(found.phases) > 1:
        for phase in found.phases:
            yield f"{f'phase {phase.index}':<20}{phase.strategy}: {phase.samples:,} samples in {_time(phase.seconds)}"
    trained = sum(phase.samples for phase in found.phases) + found.left
    if trained < found.total:
        yield f"{'stopped early':<20}at sample {trained:,} of {found.total:,}"


def _waiting(predicted: Prediction, size: int) -> Iterator[str]:
    waits = {rank: 1 - share for rank, share in predicted.computing.items()}
    if size <= 8:
        listed = ", ".join(f"rank {rank} {100 * waits[rank]:.0f} %" for rank in range(size))
    else:
        least, most = min(waits, key=waits.__getitem__), max(waits, key=waits.__getitem__)
        listed = (
            f"{100 * fmean(waits.values()):.0f} % on average, least rank {least} ({100 * waits[least]:.0f} %), "
            f"most rank {most} ({100 * waits[most]:.0f} %)"
        )
    yield f"{'not computing':<20}{listed}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
