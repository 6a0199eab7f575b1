"""One sentence that says where the time of a run went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis import Analysis

WORTH = 0.05  # of the workers' time: smaller shares are not mentioned
SLOWER = 1.15  # times the others' median: a rank that computes this much slower is named
ALIKE = 1.1
UNTRACED = "doing something that no span covers"
DOING = {
    "data": "loading data",
    "forward": "in its forward pass",
    "backward": "in its backward pass",
    "encode": "encoding gradients",
    "decode": "decoding gradients",
    "update": "updating parameters",
    "reduce": "summing gradients",
    "trace": "writing its trace",
    "checkpoint": "writing a checkpoint",
    "evaluate": "evaluating",
    "switch": "switching",
    "nothing traced": UNTRACED,
}
NAMES = {"forward": "forward pass", "backward": "backward pass"}


@dataclass(frozen=True)
class Straggler:
    """The worker that is the slowest to compute. `times`: its time per sample relative to the others' median; `what`:
    the part that is slower, or "computation"."""

    rank: int
    times: float
    what: str


def headline(analysis: Analysis) -> str:
    """A sentence on the largest share of worker time that is not computation, which ranks cause it, and why."""
    times = analysis.times
    workers = times[(times["role"] == "worker") & (times["lane"] == 0)]
    total = float(workers["total_s"].sum())
    if total <= 0:
        return "No step was traced."
    slow, waited = straggler(analysis), _waited(analysis)
    share = waited / total
    if slow is not None:
        return _of_straggler(analysis, slow, share, total)
    most = share.drop(-1, errors="ignore")
    if len(most) and most.max() >= WORTH and most.max() > share.sum() / 2:
        return _of_waiting(analysis, int(most.index[int(most.argmax())]), float(most.max()), float(share.sum()))
    return _of_no_rank(workers, total, float(share.sum()))


def straggler(analysis: Analysis) -> Straggler | None:
    """The worker that is the slowest to compute, if it is clearly slower than the others."""
    cost = _per_sample(analysis)
    if len(cost) < 2:
        return None
    rank = int(cost.index[int(cost.sum(axis=1).argmax())])
    rest, own = cost.drop(index=rank), cost.loc[[rank]].sum()
    times = float(own.sum() / rest.sum(axis=1).median())
    if not times >= SLOWER:
        return None
    ratios = {str(kind): float(own[kind] / rest[kind].median()) if rest[kind].median() > 0 else 1.0 for kind in NAMES}
    slower = [kind for kind, ratio in ratios.items() if ratio >= SLOWER]
    if len(slower) == 1 and all(ratio < ALIKE for kind, ratio in ratios.items() if kind not in slower):
        return Straggler(rank, ratios[slower[0]], NAMES[slower[0]])
    return Straggler(rank, times, "computation")


def _per_sample(analysis: Analysis) -> pd.DataFrame:
    """Seconds of forward and backward pass per sample, by worker."""
    times = analysis.times
    own = times[(times["role"] == "worker") & (times["lane"] == 0)].groupby("rank")[["forward", "backward"]].sum()
    samples = analysis.run.steps(rolled_back=True).groupby("rank")["samples"].sum().reindex(own.index)
    known = own[(samples > 0) & (own.sum(axis=1) > 0)]
    return known.div(samples[known.index], axis=0)


def _waited(analysis: Analysis) -> pd.Series[float]:
    """Seconds that workers waited, by the rank at the end of the chain."""
    times, waits = analysis.times, analysis.waits
    working = times.loc[times["role"] == "worker", ["phase", "rank"]].drop_duplicates()
    of_workers = waits[waits["lane"] == 0].merge(working, on=["phase", "rank"])
    return of_workers.groupby("root")["seconds"].sum()


def _of_straggler(analysis: Analysis, slow: Straggler, share: pd.Series[float], total: float) -> str:
    because = f"whose {slow.what} takes {slow.times:.1f}x as long as the other workers'"
    waited = float(share.get(slow.rank, 0.0))
    late = _lateness(analysis, slow.rank)
    if waited >= WORTH:
        return f"{waited:.0%} of worker time is waiting for rank {slow.rank}, {because}{late and ', and ' + late}."
    spent = _rest(analysis, total)
    slowest = f"its {slow.what} takes {slow.times:.1f}x as long as the other workers'{late and ', and ' + late}"
    return f"Rank {slow.rank} is the slowest to compute: {slowest}; {spent}."


def _lateness(analysis: Analysis, rank: int) -> str:
    """ "in asynchronous phases its gradients arrive 5.2 versions late (the other workers': 2.0)"; "" if nothing was
    stale."""
    staleness = analysis.staleness
    staleness = staleness[staleness["staleness_max"] >= 0]
    own = staleness.loc[staleness["rank"] == rank, "staleness_max"]
    rest = staleness.loc[staleness["rank"] != rank, "staleness_max"]
    if not len(own) or not len(rest) or staleness["staleness_max"].max() <= 0:
        return ""
    late = f"{own.mean():.1f} versions late (the other workers': {rest.mean():.1f})"
    return f"in asynchronous phases its gradients arrive {late}"


def _of_waiting(analysis: Analysis, rank: int, own: float, every: float) -> str:
    waits = analysis.waits
    doing = waits[(waits["root"] == rank)].groupby("doing", observed=True)["seconds"].sum()
    role = analysis.times.loc[analysis.times["rank"] == rank, "role"]
    which = f"rank {rank}" + (", the server" if len(role) and (role == "server").all() else "")
    most = DOING.get(str(doing.idxmax()), "waiting itself") if len(doing) else UNTRACED
    more = f" (of {every:.0%} waiting in total)" if every > own + 0.01 else ""
    return f"{own:.0%} of worker time{more} is waiting for {which}, which meanwhile is mostly {most}."


def _of_no_rank(workers: pd.DataFrame, total: float, waiting: float) -> str:
    computing = workers["useful_s"].sum() / total
    transfer = max(0.0, workers["communication_s"].sum() / total - waiting)
    computed = f"{computing:.0%} of worker time is computation"
    if transfer >= WORTH and transfer >= waiting:
        return f"{computed}, {transfer:.0%} moving data; no rank holds the others up."
    if waiting >= WORTH:
        return f"{computed} and {waiting:.0%} waiting, for one rank or another."
    return f"{computed}; no rank holds the others up."


def _rest(analysis: Analysis, total: float) -> str:
    times = analysis.times
    workers = times[(times["role"] == "worker") & (times["lane"] == 0)]
    computing = float(np.clip(workers["useful_s"].sum() / total, 0.0, 1.0))
    return f"{computing:.0%} of worker time is computation"
