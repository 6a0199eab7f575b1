"""What a simulation predicts, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median

from hpctrain.simulate.calibration import Calibration
from hpctrain.simulate.simulation import Simulated
from hpctrain.simulate.window import Stretch

NETWORK_ERROR = 0.05  # relative, of the time in which ranks wait for messages


@dataclass(frozen=True)
class Prediction:
    """`step`: seconds that a worker takes for a step, median over workers; `error`: of it, one standard deviation;
    `rate`: samples per second of all workers; `rest`: seconds from the end of the stretch to the end of the whole run,
    `whole`: of the whole training; `computing`: each rank's share of time. `busiest`: (name, bytes per step, share of
    time in use) of the link that is used most."""

    step: float
    error: float
    rate: float
    whole: float
    computing: dict[int, float]
    workers: list[int]
    busiest: tuple[str, float, float] | None
    total_bytes: float
    staleness: tuple[float, int] | None

    @property
    def efficiency(self) -> float:
        """The share of the workers' time in which they compute."""
        return fmean(self.computing[rank] for rank in self.workers)


def predict(found: Simulated, calibration: Calibration) -> Prediction:
    """The figures of the stretch that the simulation ran."""
    stretch, workers = found.stretch, found.workers
    seconds, per_step = stretch.seconds, _steps_per_second(stretch, workers)
    step = 1.0 / per_step
    computing = {rank: stretch.computing(rank) / seconds for rank in range(len(found.tallies))}
    share = fmean(computing[rank] for rank in workers)
    error = step * math.hypot(share * calibration.error, (1 - share) * NETWORK_ERROR)
    rate = stretch.samples / seconds
    links = {name: (n, used) for name, (n, used) in stretch.ports().items() if n and not name.endswith("memory")}
    steps = seconds * per_step
    busiest = max(links.items(), key=lambda item: item[1][1], default=None)
    stale = [value for rank in workers for value in found.tallies[rank].staleness]
    return Prediction(
        step,
        error,
        rate,
        found.total / rate,
        computing,
        workers,
        (busiest[0], busiest[1][0] / steps, busiest[1][1]) if busiest is not None else None,
        sum(n for name, (n, _) in links.items() if name.endswith(" out")) / steps,
        (fmean(stale), max(stale)) if stale and max(stale) > 0 else None,
    )


def _steps_per_second(stretch: Stretch, workers: list[int]) -> float:
    return median(stretch.steps(rank) for rank in workers) / stretch.seconds


def lines(found: Simulated, predicted: Prediction) -> Iterator[str]:
    """The table that `hpctrain simulate` prints."""
    size, relative = len(found.tallies), predicted.error / predicted.step
    rounds = found.total / predicted.rate / predicted.step
    yield f"{'step':<20}{_time(predicted.step)} +- {_time(predicted.error)}"
    yield f"{'samples per second':<20}{predicted.rate:,.0f} +- {predicted.rate * relative:,.0f}"
    finish = f"{_time(predicted.whole)} +- {_time(predicted.whole * relative)}"
    yield f"{'time to finish':<20}{finish} for {rounds:,.0f} steps of each worker, without evaluations and checkpoints"
    yield f"{'cost':<20}{predicted.whole * size:,.0f} rank-seconds"
    yield f"{'efficiency':<20}{100 * predicted.efficiency:.0f} % of the workers' time is computing"
    yield from _waiting(predicted, size)
    if predicted.busiest is not None:
        name, nbytes, used = predicted.busiest
        yield f"{'busiest link':<20}{name}: {_bytes(nbytes)} per step, in use {100 * used:.0f} % of the time"
        yield f"{'between hosts':<20}{_bytes(predicted.total_bytes)} per step, all links together"
    if predicted.staleness is not None:
        mean, most = predicted.staleness
        yield f"{'staleness':<20}{mean:.1f} updates on average, at most {most}"


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
