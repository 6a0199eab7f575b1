"""What computing and messages cost, from the traces of real runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import ceil, log2
from statistics import fmean, median
from typing import Any

import numpy as np

from hpctrain.comm.waiting import NAP, takes_naps
from hpctrain.errors import ClusterError
from hpctrain.filenames import JOB
from hpctrain.hosts import Description, Host
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
from hpctrain.trace import Run, schema
from hpctrain.trace.events import MeasuredLink, chosen

WARM = 0.2  # of the steps, which do not count
LEAST = 10  # steps that count, of a rank
SHORT = 2048  # bytes up to which a sum over ranks is by a tree
SHARED_LINK = 0.94  # of a link's rate carries data, if the cluster is not known
SUM = "reduce"  # over ranks; if it has flops, a rank's own
COMMUNICATION = [kind.name.lower() for kind in schema.COMMUNICATION]
PAUSES = ["evaluate", "checkpoint", "switch"]
Table = Any  # a frame of pandas
Costs = dict[tuple[str, str], Points]
"""Seconds by (codec, kind) and amount."""


@dataclass
class RankCosts:
    """What a worker's `steps` cost. Per step: `rest`: seconds outside of spans; `used`: seconds of cores, None: not
    traced, or a server ran beside it; `waited`: seconds in communication, in which it `napped` or polled; `messages`,
    `bytes`: that it handled. `points`: of its own spans; `beside`: of those of a server beside it."""

    steps: int
    rest: float
    used: float | None
    waited: float
    napped: bool
    messages: float
    bytes: float
    points: Costs
    beside: Costs = field(default_factory=dict)


@dataclass(frozen=True)
class RealRun:
    """A run that a calibration can come from, and the job that it trained."""

    run: Run
    job: Job

    @classmethod
    def of(cls, run: Run) -> RealRun:
        """Raises ClusterError if none can, JobError if what the job names cannot be imported."""
        return cls(run, job_of(run))

    @property
    def codec(self) -> str:
        """In which its values were sent."""
        return codec_name(self.job.schedule[0].strategy.options)


def calibration_of(runs: Sequence[RealRun], shape: Calibration, cluster: Description | None = None) -> Calibration:
    """From real runs of one model. `shape`: measured here, for what traces do not have: in which order and when
    gradients become complete, and how costs grow with the batch. `cluster`: where the runs were; None: not known.
    Raises ClusterError if the traces do not have what is needed."""
    ranks = [rank for run in runs for rank in costs_of(run)]
    measured = [*(each for rank in ranks for each in (rank.points, rank.beside)), *map(server_points, runs)]
    costs = {
        key: _typical(_least_disturbed([each[key] for each in measured if key in each]))
        for key in dict.fromkeys(key for each in measured for key in each)
    }
    for needed in ("forward", "backward"):
        if (NO_CODEC, needed) not in costs:
            raise ClusterError(
                f'{runs[0].run.folder}: no "{needed}" span of a worker was traced, which a calibration needs'
            )
    rest = min(rank.rest for rank in ranks)
    spans = {kind: cost for (_, kind), cost in costs.items() if kind not in CODED}
    codecs: dict[str, dict[str, MeasuredCost]] = {}
    for (codec, kind), cost in costs.items():
        if kind in CODED:
            codecs.setdefault(codec, {})[kind] = cost
    forward, backward = (_like(spans.pop(kind), getattr(shape.model, kind)) for kind in ("forward", "backward"))
    between, within = _links([each.run for each in runs], cluster, shape)
    return shape.model_copy(
        update={
            "source": f"traces of {len(runs)} run{'s' * (len(runs) > 1)}, such as {runs[0].run.folder.name}",
            "model": shape.model.model_copy(update={"forward": forward, "backward": backward}),
            "spans": {**shape.spans, **spans},
            "codecs": {name: {**shape.codecs.get(name, {}), **kinds} for name, kinds in codecs.items()},
            "step": MeasuredCost(fixed_s=rest),
            "handling": handling_of(ranks, costs, rest, shape.handling),
            "between": between,
            "within": within,
        }
    )


def job_of(run: Run) -> Job:
    """The job that a run trained. Raises ClusterError if no calibration can come from it, JobError if what the job
    names cannot be imported."""
    if run.simulated:
        raise ClusterError(f"{run.folder} was simulated; a calibration needs real runs")
    if len(run.attempts) > 1:
        raise ClusterError(f"{run.folder} was resumed; a calibration needs runs that trained in one go")
    job = Job.load(run.folder / JOB)
    if len(job.schedule) > 1:
        raise ClusterError(f"{run.folder}: its job has several phases; a calibration needs runs of one strategy each")
    for rank in run.ranks:
        known = run.attributes(rank)
        if known.get("device", "cpu") != "cpu":
            raise ClusterError(f"{run.folder}: rank {rank} computed on {known['device']}; only CPUs can be calibrated")
        threads = job.threads if isinstance(job.threads, int) else max(1, int(known.get("cores", 1)))
        if threads > 1:
            raise ClusterError(
                f"{run.folder}: rank {rank} computed with {threads} threads; a calibration is of single cores: "
                "train with threads=1"
            )
    return job


# -- from traces -------------------------------------------------------------------------------------------------
def costs_of(real: RealRun) -> Iterator[RankCosts]:
    """Of each worker of a run. Raises ClusterError if its traces do not have what is needed."""
    run = real.run
    steps_of = run.steps().groupby("rank")
    workers = [int(str(rank)) for rank, _ in steps_of]
    nodes = {run.attributes(rank)["node"] for rank in workers}
    size = len(nodes) if len(nodes) > 1 else len(workers)  # of a sum: ranks of a node share memory
    cores = [float(run.attributes(rank).get("cores", 1.0)) for rank in run.ranks]
    naps = takes_naps(real.job.communicator.wait, min(cores))
    for rank, steps in steps_of:
        ends = steps["t_s"].to_numpy()
        first = ceil(WARM * len(ends))
        if len(ends) - first <= LEAST:
            raise ClusterError(
                f"{run.folder}: rank {rank} has traces of {len(ends)} steps, of which the first {WARM:.0%} do not "
                f"count; at least {ceil((LEAST + 1) / (1 - WARM))} are needed: train longer"
            )
        yield _costs(run, int(str(rank)), ends[first:], size, real.codec, naps)


def server_points(real: RealRun) -> Costs:
    """What servers on ranks of their own compute."""
    workers = set(real.run.steps()["rank"])
    servers = [rank for rank in real.run.ranks if rank not in workers]
    if not servers:
        return {}
    spans = real.run.spans(servers)
    return _points(spans[~_sent(spans)], real.codec)


def _costs(run: Run, rank: int, ends: Any, size: int, codec: str, naps: bool) -> RankCosts:
    spans = run.spans(rank)
    beside = spans[spans["lane"] > 0]
    spans = spans[(spans["lane"] == 0) & (spans["start_s"] >= ends[0]) & (spans["start_s"] < ends[-1])]
    if not len(spans):
        raise ClusterError(f"{run.folder}: rank {rank} has no spans in its trace; train with trace.enabled = true")
    step = np.searchsorted(ends, spans["start_s"].to_numpy(), side="right") - 1
    paused = np.zeros(len(ends) - 1, bool)
    paused[step[spans["kind"].isin(PAUSES).to_numpy()]] = True
    if paused.all():
        raise ClusterError(f"{run.folder}: rank {rank} was evaluated or saved in every step; train with fewer pauses")
    spans, step = spans[~paused[step]], step[~paused[step]]
    seconds, sent = (spans["end_s"] - spans["start_s"]).to_numpy(), _sent(spans).to_numpy()
    covered = np.zeros(len(paused))
    np.add.at(covered, step, seconds)
    taken, steps = np.diff(ends), int((~paused).sum())
    messages, nbytes = _handled(spans[sent], size)
    cpu = _processor_use(run, rank, ends, paused)
    return RankCosts(
        steps=steps,
        rest=max(0.0, float(np.median((taken - covered)[~paused]))),
        used=None if cpu is None or len(beside) else cpu * float(taken[~paused].mean()),
        waited=float(seconds[sent].sum()) / steps,
        napped=naps,
        messages=messages / steps,
        bytes=nbytes / steps,
        points=_points(spans[~sent], codec),
        beside=_points(beside[~_sent(beside)], codec),
    )


def _processor_use(run: Run, rank: int, ends: Any, paused: Any) -> float | None:
    """Cores that the rank used in steps that were not paused; None: not traced often enough."""
    use = run.resources(rank)
    times, cpu = use["t_s"].to_numpy(), use["cpu"].to_numpy()
    kept = []
    for begin, end, value in zip(times, times[1:], cpu[1:], strict=False):
        first, last = np.searchsorted(ends, [begin, end], side="right") - 1
        if value >= 0 and begin > ends[0] and end < ends[-1] and not paused[first : last + 1].any():
            kept.append(value / 100)
    return float(np.mean(kept)) if len(kept) > 1 else None


def _sent(spans: Table) -> Table:
    """For each span: whether it is communication."""
    return spans["kind"].isin(COMMUNICATION) & ~((spans["kind"] == SUM) & (spans["flops"] > 0))


def _points(spans: Table, codec: str) -> Costs:
    """Seconds of spans that were perhaps cut into pieces."""
    found: Costs = defaultdict(lambda: defaultdict(list))
    seconds = (spans["end_ns"] - spans["start_ns"]) / 1e9
    for (kind, _, _), whole in spans.assign(seconds=seconds).groupby(["kind", "rank", "lane"], observed=True):
        number = (whole["piece"] == 0).cumsum()
        sums = whole.groupby(number)["seconds"].sum()
        heads = whole[whole["piece"] == 0]
        amounts = heads["items" if kind in PASSES else "bytes"].to_numpy()
        for amount, value in zip(amounts, sums[sums.index > 0].to_numpy(), strict=True):
            if amount:
                found[codec if kind in CODED else NO_CODEC, str(kind)][float(amount)].append(float(value))
    return found


def _handled(spans: Table, size: int) -> tuple[float, float]:
    """(messages, bytes) that a rank has sent and received, according to its communication spans."""
    own = spans[spans["bytes"] > 0]
    sums = own[own["kind"] == SUM]["bytes"].to_numpy().astype(float)
    single = own[own["kind"] != SUM]
    rounds = 2 * ceil(log2(size)) if size > 1 else 0  # of a sum over ranks: one message out, one in
    share = np.where(sums > SHORT, 4 * (size - 1) / max(size, 1), 2.0 * rounds)
    return len(single) + 2.0 * rounds * len(sums), float(single["bytes"].sum()) + float((sums * share).sum())


# -- costs -------------------------------------------------------------------------------------------------------
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
    middles = [(median(values), np.subtract(*np.percentile(values, [75, 25]))) for values in points.values()]
    spread = fmean(float(width) / 1.349 / middle if middle else 0.0 for middle, width in middles)
    return line_through(points).model_copy(update={"spread": spread})


def _like(found: MeasuredCost, shape: MeasuredCost) -> MeasuredCost:
    """A cost that grows with the amount as `shape`, if only one amount was seen."""
    usual = shape.seconds(found.most)
    if found.least < found.most or not usual:
        return found
    factor = found.seconds(found.most) / usual
    scaled = {"fixed_s": shape.fixed_s * factor, "each_s": shape.each_s * factor}
    return found.model_copy(update={**scaled, "least": min(found.least, shape.least)})


def handling_of(
    ranks: Iterable[RankCosts],
    costs: Mapping[tuple[str, str], MeasuredCost],
    rest: float,
    usual: HandlingCosts,
) -> HandlingCosts:
    """From the processor time that computing does not explain: non-negative least squares over ranks and runs. `usual`,
    if none was traced; also for naps where ranks polled instead, which takes all of the time that they wait."""
    known = [rank for rank in ranks if rank.used is not None]
    if not known:
        return usual
    table = np.array([[rank.messages, rank.bytes, 1.0, rank.waited * rank.napped] for rank in known])
    polled = [0.0 if rank.napped else rank.waited for rank in known]
    computed = [rest + _computed(rank, costs) for rank in known]
    other = np.array([rank.used or 0.0 for rank in known]) - computed - polled
    message, byte, step, napping = _no_negative(table, other)
    napping = min(1.0, napping) if any(rank.napped for rank in known) else usual.napping
    return HandlingCosts(message_s=message, byte_s=byte, napping=napping, step_s=step)


def _no_negative(table: Any, wanted: Any) -> list[float]:
    """The solution of table @ x = wanted (least squares) with no negative part: the best of all subsets."""
    scale = np.maximum(table.max(axis=0), 1e-12)
    best, error, width = np.zeros(table.shape[1]), float(np.sum(wanted**2)), table.shape[1]
    for some in (list(columns) for count in range(width) for columns in combinations(range(width), count + 1)):
        part = (table / scale)[:, some]
        values = np.linalg.lstsq(part, wanted, rcond=None)[0]
        wrong = float(np.sum((part @ values - wanted) ** 2))
        if (values >= 0).all() and wrong < error:
            best, error = np.zeros(width), wrong
            best[some] = values
    return [float(value) for value in best / scale]


def _computed(rank: RankCosts, costs: Mapping[tuple[str, str], MeasuredCost]) -> float:
    """Seconds of a core per step that the costs of its spans say."""
    total = 0.0
    for key, points in rank.points.items():
        total += sum(len(values) * costs[key].seconds(amount) for amount, values in points.items())
    return total / rank.steps


# -- links -------------------------------------------------------------------------------------------------------
def _links(
    runs: Sequence[Run], cluster: Description | None, shape: Calibration
) -> tuple[LinkCosts, LinkCosts]:
    """Between hosts and within one, as measured at the beginning of the runs. What the cluster's own links take does
    not belong to them, and neither does half a nap of who waited."""
    hosts = cluster.each() if cluster is not None else []
    between, within = shape.between, shape.within
    latency: dict[bool, list[float]] = {True: [], False: []}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for run in runs:
        for rank, _, _, link in chosen(run.events(), MeasuredLink):
            ends = [run.attributes(each) for each in (rank, link.peer)]
            own, rate = _ends_of_link([int(end["node"]) for end in ends], hosts)
            napped = NAP / 2 if min(float(end.get("cores", 1.0)) for end in ends) < 1 else 0.0
            latency[link.same_node].append(max(0.0, link.latency_s - own - napped))
            rates[link.same_node].append(link.bytes_per_s / (1.0 if link.same_node or rate is None else rate))
    if rates[False]:
        share = min(1.0, max(rates[False])) if hosts else SHARED_LINK
        update = {"latency_s": median(latency[False]), "efficiency": share, "overhead_s": 0.0}
        between = between.model_copy(update=update)
    if rates[True]:
        update = {"latency_s": median(latency[True]), "bytes_per_s": max(rates[True]), "overhead_s": 0.0}
        within = within.model_copy(update=update)
    return between, within


def _ends_of_link(nodes: Sequence[int], hosts: Sequence[Host]) -> tuple[float, float | None]:
    """(seconds of latency, bytes per second) of the cluster's link between two nodes; None: not known."""
    links = [hosts[node].link for node in nodes if node < len(hosts)]
    if len(links) < len(nodes):
        return 0.0, None
    return fmean(link.latency_ms for link in links) / 1e3, min(link.mbit_per_s for link in links) * 1e6 / 8
