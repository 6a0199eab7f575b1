"""The values of a run that are compared: a `RunSummary`, computed from its analysis by a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.filenames import MODEL
from hpctrain.job import file as jobfile

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis import Analysis
    from hpctrain.trace import Run

NAMED = "metric."  # columns of evaluations with several values
NAN = float("nan")
EPOCH_END = ("validation", "test")  # the split evaluated during training is the first of these that exists


@dataclass(frozen=True, eq=False)
class RunSummary:
    """A run in numbers. NaN: unknown.

    `workers`, `servers`: their number, by phase. `training_s`: seconds without evaluations and checkpoints; `total_s`:
    including them, from the beginning to the end of the traces, summed over attempts. `steps`: rounds, or updates where
    workers do not step together. `useful_s`: seconds of computation, summed over all ranks. `transferred`: bytes that
    all ranks sent during training, in messages, in collectives and through shared memory. Efficiencies: over all
    phases, weighted by their seconds. Staleness: over all gradients, in versions. `finished`: whether the run reached
    its end. `losses`: a row per step: samples, seconds, loss (in training). `evaluations`: a row per evaluation:
    samples, seconds, split, loss, metric and, of evaluations with several values, metric.NAME.
    """

    name: str
    folder: Path
    strategy: str
    ranks: int
    workers: tuple[int, ...]
    servers: tuple[int, ...]
    nodes: int
    attempts: int
    samples: int
    steps: int
    training_s: float
    total_s: float
    parallel_efficiency: float
    load_balance: float
    communication_efficiency: float
    useful_s: float
    transferred: float
    staleness_mean: float
    staleness_p95: float
    finished: bool
    losses: pd.DataFrame
    evaluations: pd.DataFrame
    job: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Samples per training second."""
        return _ratio(self.samples, self.training_s)

    @property
    def rank_seconds(self) -> float:
        """The cost of the run: its total seconds times the number of ranks, including servers and waiting ranks."""
        return self.ranks * self.total_s

    @property
    def useful_s_per_sample(self) -> float:
        """Seconds of computation per sample, on all ranks together."""
        return _ratio(self.useful_s, self.samples)

    @property
    def colocated(self) -> bool:
        """Whether servers ran on the same ranks as workers."""
        return any(workers + servers > self.ranks for workers, servers in zip(self.workers, self.servers, strict=False))

    @property
    def crew(self) -> str:
        """Workers and servers of the phase with the most servers: "3 workers, 1 server"."""
        pairs = list(zip(self.workers, self.servers, strict=False)) or [(0, 0)]
        workers, servers = max(pairs, key=lambda pair: pair[1])
        many = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((workers, "worker"), (servers, "server")) if n]
        return ", ".join(many) + " beside workers" * self.colocated

    @property
    def metric(self) -> str:
        """The name of the metric."""
        if (monitor := self.job.get("metric.monitor")) is not None:
            return str(monitor)
        own = "evaluate.name" in self.job
        return "metric" if own else str(self.job.get("metric.name", self.job.get("metric", "accuracy")))

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values of the metric are better."""
        return bool(self.job.get("metric.goal", "max") == "max")

    @property
    def split(self) -> str:
        """The split evaluated during training; "" if there was none."""
        found = set(self.evaluations["split"])
        return next((split for split in EPOCH_END if split in found), "")

    @property
    def course(self) -> pd.DataFrame:
        """The evaluations during training."""
        return self.evaluations[self.evaluations["split"] == self.split]

    @property
    def best_metric(self) -> float:
        """The best metric of the evaluations during training."""
        values = self.course["metric"]
        return float(values.max() if self.higher_is_better else values.min())

    @property
    def test_loss(self) -> float:
        """The loss of the last evaluation on the test samples."""
        return self._last_test("loss")

    @property
    def test_metric(self) -> float:
        """The metric of the last evaluation on the test samples."""
        return self._last_test("metric")

    @property
    def test_values(self) -> dict[str, float]:
        """The values of the last evaluation on the test samples by name, where evaluations have several."""
        named = [name for name in self.evaluations.columns if name.startswith(NAMED)]
        return {name.removeprefix(NAMED): self._last_test(name) for name in named}

    def _last_test(self, column: str) -> float:
        values = self.evaluations.loc[self.evaluations["split"] == "test", column]
        return float(values.iloc[-1]) if len(values) else NAN

    def mean_losses(self, window: float) -> pd.DataFrame:
        """Columns samples, seconds, loss: after each step, the mean training loss over the last `window` samples.

        The first steps, with fewer samples behind them, are left out.
        """
        rows = self.losses[np.isfinite(self.losses["loss"])]
        samples, loss = rows["samples"].to_numpy(float), rows["loss"].to_numpy(float)
        if not len(samples):
            return rows
        first = samples[0] - (samples[1] - samples[0]) if len(samples) > 1 else 0.0
        edges = np.concatenate([[max(0.0, first)], samples])
        sums = np.concatenate([[0.0], np.cumsum(loss * np.diff(edges))])
        behind = np.maximum(samples - window, edges[0])
        width = np.maximum(samples - behind, 1e-9)
        means = (sums[1:] - np.interp(behind, edges, sums)) / width
        return rows.assign(loss=means)[samples - edges[0] >= window * (1 - 1e-9)]

    def time_to_loss(self, target: float, window: float) -> float:
        """Training seconds to the first step whose mean loss is at most `target`; inf if none, NaN without losses."""
        rows = self.mean_losses(window)
        return _first(rows["seconds"], rows["loss"] <= target)

    def time_to_metric(self, target: float) -> float:
        """Training seconds to the first evaluation at least as good as `target`; inf if none, NaN without any."""
        rows = self.course
        reached = rows["metric"] >= target if self.higher_is_better else rows["metric"] <= target
        return _first(rows["seconds"], reached)


def summarise(analysis: Analysis, name: str) -> RunSummary:
    """The summary of the run in `analysis`, under the name `name`."""
    run, phases, times = analysis.run, analysis.phases, analysis.times
    losses, evaluations = analysis.convergence[["samples", "seconds", "loss"]], _evaluations(analysis)
    stale = analysis.staleness["staleness_max"]
    stale = stale[stale >= 0]
    efficiency = analysis.efficiency
    return RunSummary(
        name=name,
        folder=run.folder,
        strategy=" → ".join(dict.fromkeys(phases.sort_values("phase")["strategy"])) or "-",
        ranks=run.size,
        workers=_count(phases, phases["role"] == "worker"),
        servers=_count(times, (times["role"] == "server") | (times["lane"] == 1)),
        nodes=len({run.attributes(rank).get("node", 0) for rank in run.ranks}),
        attempts=len(run.attempts),
        samples=int(losses["samples"].max()) if len(losses) else 0,
        steps=len(losses),
        training_s=float(losses["seconds"].max()) if len(losses) else NAN,
        total_s=_total_seconds(run),
        parallel_efficiency=_weighted(efficiency, "parallel_efficiency"),
        load_balance=_weighted(efficiency, "load_balance"),
        communication_efficiency=_weighted(efficiency, "communication_efficiency"),
        useful_s=float(times["useful_s"].sum()) * _kept(run),
        transferred=float(analysis.convergence["bytes"].max()) if len(losses) else 0.0,
        staleness_mean=float(stale.mean()) if len(stale) else NAN,
        staleness_p95=float(stale.quantile(0.95)) if len(stale) else NAN,
        finished=(run.folder / MODEL).exists() or bool(run.simulated),
        losses=losses,
        evaluations=evaluations,
        job=job_keys(run),
        notes=tuple(run.notes),
    )


def _kept(run: Run) -> float:
    """The share of all samples that was not lost when resuming from a checkpoint."""
    every = run.steps(rolled_back=True)["samples"].sum()
    return float(run.steps()["samples"].sum() / every) if every else 1.0


def job_keys(run: Run) -> dict[str, Any]:
    """The resolved job by key: {"train.epochs": 3.0, ...}, without importing user code; {} if it cannot be parsed."""
    try:
        return dict(_flat(jobfile.parse(run.job_text)))
    except ValueError:
        return {}


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{place}.{key}" if place else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [pair for index, inner in enumerate(value) for pair in _flat(inner, f"{place}.{index}")]
    return [(place, value)]


def _evaluations(analysis: Analysis) -> pd.DataFrame:
    import pandas as pd

    columns = ["samples", "seconds", "split", "loss", "metric"]
    rows = analysis.metrics
    named = [name for name in rows.columns if name.startswith(NAMED)]
    return rows[[*columns, *named]] if len(rows) else pd.DataFrame(columns=columns)


def _count(rows: pd.DataFrame, which: pd.Series[bool]) -> tuple[int, ...]:
    """The number of ranks by phase, among the rows selected by `which`."""
    counts = rows[which].groupby("phase")["rank"].nunique()
    return tuple(int(counts.get(phase, 0)) for phase in sorted(rows["phase"].unique()))


def _total_seconds(run: Run) -> float:
    """Seconds from the first to the last time in the traces of each attempt, summed. Spans are not read: they are many,
    and clocks are measured at the beginning and end of a run anyway."""
    bounds: dict[int, tuple[int, int]] = {}
    for table in ("clock", "steps", "events", "resources"):
        for _, attempt, rows in run.blocks(table):
            first, last = int(rows["t_ns"].min()), int(rows["t_ns"].max())
            low, high = bounds.get(attempt, (first, last))
            bounds[attempt] = min(low, first), max(high, last)
    return sum(high - low for low, high in bounds.values()) / 1e9 if bounds else NAN


def _weighted(efficiency: pd.DataFrame, column: str) -> float:
    values, seconds = (efficiency[name].to_numpy(float) for name in (column, "seconds"))
    known = np.isfinite(values) & (seconds > 0)
    return float(np.average(values[known], weights=seconds[known])) if known.any() else NAN


def _first(seconds: pd.Series[float], reached: pd.Series[bool]) -> float:
    if not len(seconds):
        return NAN
    return float(seconds[reached].min()) if reached.any() else float("inf")


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else NAN
