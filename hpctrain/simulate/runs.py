"""What computing and messages cost, from the traces of real runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import ceil, log2
from statistics import fmean, median
from typing import Any

import numpy as np

from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.simulate.calibration import (
    NO_CODEC,
    Calibration,
    HandlingCosts,
    LinkCosts,
    MeasuredCost,
    codec_name,
)
from hpctrain.simulate.samples import CODED, PASSES, Points, line_through
from hpctrain.trace import schema
from hpctrain.trace.events import MeasuredLink, chosen
from hpctrain.trace.reader import Run

WARM = 0.2  # of the steps, which do not count
LEAST = 10  # steps that count, of a rank
SHORT = 2048  # bytes up to which a sum over ranks is by a tree
SHARED_LINK = 0.94  # of a link's rate carries data, if the cluster is not known
SUM = "reduce"  # over ranks; if it has flops, a rank's own
COMMUNICATION = [kind.name.lower() for kind in schema.COMMUNICATION]
Table = Any  # a frame of pandas


@dataclass
class RankCosts:
    """What a worker's `steps` cost. `points`: seconds by (codec, kind) and amount. Per step: `step`: seconds from one
    to the next; `rest`: of these outside of spans; `used`: seconds of cores, None: not traced; `waited`: in
    communication; `messages`, `bytes`: that it handled."""

    step: float
    rest: float
    used: float | None
    waited: float
    messages: float
    bytes: float
    steps: int
    points: dict[tuple[str, str], Points] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))


def costs_of(run: Run) -> Iterator[RankCosts]:
    """Of each worker of a run. Raises ClusterError if its traces do not have what is needed."""
    steps_of, codec = run.steps().groupby("rank"), _codec(run)
    for rank, steps in steps_of:
        ends = steps["t_s"].to_numpy()
        first = ceil(WARM * len(ends))
        if len(ends) - first < LEAST:
            raise ClusterError(
                f"{run.folder}: rank {rank} has traces of {len(ends)} steps, of which the first {WARM:.0%} do not "
                f"count; at least {ceil((LEAST + 1) / (1 - WARM))} are needed: train longer"
            )
        yield _costs(run, int(str(rank)), ends[first:], len(steps_of), codec)


def server_points(run: Run) -> dict[tuple[str, str], Points]:
    """What servers compute, also those beside workers: seconds by (codec, kind) and amount."""
    spans, workers = run.spans(), run.steps()["rank"].unique()
    spans = spans[~spans["rank"].isin(workers) | (spans["lane"] > 0)]
    return _points(spans[~_sent(spans)], _codec(run))


def _codec(run: Run) -> str:
    return codec_name(job_of(run).schedule[0].strategy.options)


def _sent(spans: Table) -> Table:
    """For each span: whether it is communication."""
    return spans["kind"].isin(COMMUNICATION) & ~((spans["kind"] == SUM) & (spans["flops"] > 0))


def _points(spans: Table, codec: str) -> dict[tuple[str, str], Points]:
    """Seconds of spans that were perhaps cut into pieces."""
    found: dict[tuple[str, str], Points] = defaultdict(lambda: defaultdict(list))
    seconds = (spans["end_ns"] - spans["start_ns"]) / 1e9
    for (kind, _, _), whole in spans.assign(seconds=seconds).groupby(["kind", "rank", "lane"], observed=True):
        number = (whole["piece"] == 0).cumsum()
        sums = whole.groupby(number)["seconds"].sum().to_numpy()
        heads = whole[whole["piece"] == 0]
        amounts = heads["items" if kind in PASSES else "bytes"].to_numpy()
        for amount, value in zip(amounts, sums[-len(amounts) :], strict=True):
            if amount:
                found[codec if kind in CODED else NO_CODEC, str(kind)][float(amount)].append(float(value))
    return found


def job_of(run: Run) -> Job:
    """The job that a run trained. Raises ClusterError if it cannot be calibrated from."""
    if run.simulated:
        raise ClusterError(f"{run.folder} was simulated; a calibration needs real runs")
    if not isinstance(run.job, Job):
        raise ClusterError(f"{run.folder}: its job cannot be read: {run.job}")
    if len(run.job.schedule) > 1:
        raise ClusterError(f"{run.folder}: its job has several phases; a calibration needs runs of one strategy each")
    return run.job


def _costs(run: Run, rank: int, ends: Any, size: int, codec: str) -> RankCosts:
    spans = run.spans(rank)
    spans = spans[(spans["lane"] == 0) & (spans["start_s"] >= ends[0]) & (spans["start_s"] < ends[-1])]
    if not len(spans):
        raise ClusterError(f"{run.folder}: rank {rank} has no spans in its trace; train with trace.enabled = true")
    spans = spans.assign(seconds=spans["end_s"] - spans["start_s"])
    sent = _sent(spans)
    steps, taken = len(ends) - 1, np.diff(ends)
    covered = np.zeros(steps)
    np.add.at(covered, np.searchsorted(ends, spans["start_s"].to_numpy(), side="right") - 1, spans["seconds"])
    messages, nbytes = _handled(spans[sent], size)
    use = run.resources(rank)
    use = use[(use["t_s"] > ends[0]) & (use["t_s"] < ends[-1]) & (use["cpu"] >= 0)]
    return RankCosts(
        step=float(taken.mean()),
        rest=max(0.0, float(np.median(taken - covered))),
        used=float(use["cpu"].mean()) / 100 * float(taken.mean()) if len(use) > 1 else None,
        waited=float(spans["seconds"][sent].sum()) / steps,
        messages=messages / steps,
        bytes=nbytes / steps,
        steps=steps,
        points=_points(spans[~sent], codec),
    )


def _handled(spans: Table, size: int) -> tuple[float, float]:
    """(messages, bytes) that a rank has sent and received, according to its communication spans."""
    own = spans[spans["bytes"] > 0]
    sums = own[own["kind"] == SUM]["bytes"].to_numpy().astype(float)
    single = own[own["kind"] != SUM]
    rounds = 2 * ceil(log2(size)) if size > 1 else 0  # of a sum over ranks: one message out, one in
    long = sums > SHORT
    share = np.where(long, 4 * (size - 1) / max(size, 1), 2.0 * rounds)
    return len(single) + 2.0 * rounds * len(sums), float(single["bytes"].sum()) + float((sums * share).sum())


def calibration_of(runs: Sequence[Run], shape: Calibration, rate: float | None = None) -> Calibration:
    """From real runs of one model. `shape`: measured here, for what traces do not have: in which order and when
    gradients become complete, and how costs grow with the batch. `rate`: bits per second of the links between hosts, as
    in their cluster file; None: not known. Raises ClusterError if the traces do not have what is needed."""
    ranks = [rank for run in runs for rank in costs_of(run)]
    points: dict[tuple[str, str], Points] = {}
    measured = [*(rank.points for rank in ranks), *map(server_points, runs)]
    for key in dict.fromkeys(key for each in measured for key in each):
        points[key] = _least_disturbed([each[key] for each in measured if key in each])
    for needed in ("forward", "backward"):
        if (NO_CODEC, needed) not in points:
            raise ClusterError(
                f'{runs[0].folder}: no "{needed}" span of a worker was traced, which a calibration needs'
            )
    costs = {key: _typical(each) for key, each in points.items()}
    rest = min(rank.rest for rank in ranks)
    spans = {kind: cost for (_, kind), cost in costs.items() if kind not in CODED}
    codecs: dict[str, dict[str, MeasuredCost]] = {}
    for (codec, kind), cost in costs.items():
        if kind in CODED:
            codecs.setdefault(codec, {})[kind] = cost
    forward, backward = (_like(spans.pop(kind), getattr(shape.model, kind)) for kind in ("forward", "backward"))
    between, within = _links(runs, rate, shape)
    return shape.model_copy(
        update={
            "source": f"traces of {len(runs)} run{'s' * (len(runs) > 1)}, such as {runs[0].folder.name}",
            "model": shape.model.model_copy(update={"forward": forward, "backward": backward}),
            "spans": {**shape.spans, **spans},
            "codecs": {name: {**shape.codecs.get(name, {}), **kinds} for name, kinds in codecs.items()},
            "step": MeasuredCost(fixed_s=rest),
            "handling": handling_of(ranks, costs, rest) or shape.handling,
            "between": between,
            "within": within,
        }
    )


def _least_disturbed(ranks: Sequence[Points]) -> Points:
    """For each amount, the measurements of the rank whose median is lowest: others waited for a core more often."""
    found: Points = {}
    for points in ranks:
        for amount, values in points.items():
            if amount not in found or median(values) < median(found[amount]):
                found[amount] = values
    return found


def _typical(points: Points) -> MeasuredCost:
    """The line through medians; the spread is that of the middle half, which a core's other tasks do not reach."""
    found = line_through(points)
    middle = [np.subtract(*np.percentile(values, [75, 25])) / 1.349 / median(values) for values in points.values()]
    return found.model_copy(update={"spread": float(fmean(middle))})


def _like(found: MeasuredCost, shape: MeasuredCost) -> MeasuredCost:
    """A cost that grows with the amount as `shape`, if only one amount was seen."""
    if found.least < found.most:
        return found
    factor = found.seconds(found.most) / shape.seconds(found.most)
    scaled = {"fixed_s": shape.fixed_s * factor, "each_s": shape.each_s * factor}
    return found.model_copy(update={**scaled, "least": min(found.least, shape.least)})


def handling_of(
    ranks: Sequence[RankCosts], costs: dict[tuple[str, str], MeasuredCost], rest: float
) -> HandlingCosts | None:
    """From the processor time that computing does not explain: non-negative least squares. None: nothing was traced."""
    known = [rank for rank in ranks if rank.used is not None]
    if not known:
        return None
    table = np.array([[rank.messages, rank.bytes, rank.waited, 1.0] for rank in known])
    scale = np.maximum(table.max(axis=0), 1e-12)
    other = np.array([(rank.used or 0.0) - rest - _computed(rank, costs) for rank in known])
    best, error = np.zeros(4), float("inf")
    for count in range(1, 5):
        for columns in combinations(range(4), count):
            some = list(columns)
            values = np.linalg.lstsq((table / scale)[:, some], other, rcond=None)[0]
            wrong = float(np.sum(((table / scale)[:, some] @ values - other) ** 2))
            if (values >= 0).all() and wrong < error:
                best, error = np.zeros(4), wrong
                best[some] = values
    message, byte, napping, step = (float(value) for value in best / scale)
    return HandlingCosts(message_s=message, byte_s=byte, napping=min(1.0, napping), step_s=step)


def _computed(rank: RankCosts, costs: dict[tuple[str, str], MeasuredCost]) -> float:
    """Seconds of a core per step that the costs of its spans say."""
    total = 0.0
    for key, points in rank.points.items():
        total += sum(len(values) * costs[key].seconds(amount) for amount, values in points.items())
    return total / rank.steps


def _links(runs: Sequence[Run], rate: float | None, shape: Calibration) -> tuple[LinkCosts, LinkCosts]:
    """Between hosts and within one, as measured at the beginning of the runs."""
    links = [link for run in runs for _, _, _, link in chosen(run.events(), MeasuredLink)]
    apart, together = ([link for link in links if link.same_node == same] for same in (False, True))
    between, within = shape.between, shape.within
    if apart:
        latency = median(link.latency_s for link in apart)
        carried = max(link.bytes_per_s for link in apart)
        share = min(1.0, carried * 8 / rate) if rate is not None else SHARED_LINK
        between = between.model_copy(update={"latency_s": latency, "efficiency": share, "overhead_s": 0.0})
    if together:
        fastest = max(link.bytes_per_s for link in together)
        latency = median(link.latency_s for link in together)
        within = within.model_copy(update={"latency_s": latency, "bytes_per_s": fastest, "overhead_s": 0.0})
    return between, within
