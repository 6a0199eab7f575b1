"""Which rank waited for which, what that rank was doing meanwhile, and which ranks held up synchronous steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.errors import TraceError
from hpctrain.trace.schema import KINDS, Kind

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis.course import Course

Rows = np.ndarray[Any, Any]
UNKNOWN = -1
UNTRACED = "nothing traced"
MOST_RANKS = 5000  # in a matrix: 200 MB
HOPS = 4  # the most followed in a chain of ranks that wait for each other
COLUMNS = ["phase", "step", "rank", "lane", "start_ns", "end_ns", "seconds", "peer", "root", "doing"]


def attribute(course: Course) -> pd.DataFrame:
    """Every wait, with the rank waited for and what that rank was doing; columns are COLUMNS.

    In a collective or barrier a rank waits until the last rank arrives: that rank is `peer`. For a message it waits
    until the sender begins to send. The time after that is transfer, not waiting. If the peer itself was waiting,
    `root` is the rank at the end of the chain. `doing`: the root's span kind, or "nothing traced"; a wait during which
    it changed is several rows. Waits with no known peer have peer and root -1 and `doing` "". `seconds` are divided by
    `course.share`.
    """
    import pandas as pd

    spans = course.spans.reset_index(drop=True)
    waits = _waits(course.training)
    pieces = _resolve(spans, waits)
    pieces["seconds"] = (pieces["end_ns"] - pieces["start_ns"]) / 1e9 / course.share
    named = np.array(["", *KINDS, UNTRACED], object)
    pieces["doing"] = pd.Categorical(named[pieces["doing"].to_numpy(np.int64)], categories=list(named))
    return pieces.sort_values(["start_ns", "rank"], kind="stable", ignore_index=True)[COLUMNS]


def matrix(waits: pd.DataFrame, size: int, phase: int | None = None) -> pd.DataFrame:
    """Seconds waited: rows are the ranks that waited, columns the root ranks they waited for (-1: unknown).

    Raises TraceError for more than MOST_RANKS ranks.
    """
    check_matrix(size)
    chosen = waits if phase is None else waits[waits["phase"] == phase]
    table = chosen.pivot_table(index="rank", columns="root", values="seconds", aggfunc="sum", fill_value=0.0)
    columns = [*range(size), *([UNKNOWN] if UNKNOWN in table.columns else [])]
    return table.reindex(index=range(size), columns=columns, fill_value=0.0)


def check_matrix(ranks: int) -> None:
    """Raise TraceError if a matrix of this many ranks is too large: a damaged file may claim a million."""
    if ranks > MOST_RANKS:
        raise TraceError(f"a matrix of {ranks:,} ranks is too large; the limit is {MOST_RANKS:,}")


# -- which rank was waited for -------------------------------------------------------------------------------------
def _waits(spans: pd.DataFrame) -> pd.DataFrame:
    """Columns attempt, phase, step, rank, lane, start_ns, end_ns (without the transfer), peer, peer_lane."""
    import pandas as pd

    inside = spans[spans["communication"].astype(bool)]
    together = (inside["peer"] < 0) & (inside["id"] >= 0)
    message = (inside["peer"] >= 0) & (inside["id"] >= 0)
    transfer = inside["kind"].isin([Kind.SEND, Kind.REDUCE])  # of device memory, if without an id
    rest = inside[~together & ~message & ~transfer].assign(peer=UNKNOWN, peer_lane=0)
    found = pd.concat([_for_last(inside[together]), _for_sender(inside[message]), rest], ignore_index=True)
    found = found[found["end_ns"] > found["start_ns"]]
    columns = ["attempt", "phase", "step", "rank", "lane", "start_ns", "end_ns", "peer", "peer_lane"]
    return found[columns].reset_index(drop=True)


def _for_last(inside: pd.DataFrame) -> pd.DataFrame:
    """Collectives: wait until the last rank arrives; the receivers of a broadcast wait until its sender does."""
    key = ["attempt", "id"]
    arrivals = (
        inside.assign(sends=inside["kind"] == Kind.SEND)
        .groupby([*key, "rank"], as_index=False)
        .agg(came=("start_ns", "min"), sends=("sends", "any"))
    )
    order = arrivals.sort_values(["sends", "came"])
    last = order.groupby(key, as_index=False).agg(peer=("rank", "last"), came=("came", "last"), ranks=("rank", "size"))
    rows = inside.drop(columns="peer").merge(last, on=key)
    rows = rows[rows["ranks"] > 1]
    own = rows["rank"] == rows["peer"]
    rows["end_ns"] = np.where(own, rows["start_ns"], np.minimum(rows["end_ns"], rows["came"]))
    return rows.assign(peer_lane=0)


def _for_sender(inside: pd.DataFrame) -> pd.DataFrame:
    """Messages: wait until the other end arrives: the sender at its send, the receiver at its receive."""
    key = ["attempt", "id"]
    sends = inside[inside["kind"] == Kind.SEND]
    begun = sends.sort_values("start_ns").drop_duplicates([*key, "rank", "peer"])
    begun = begun.rename(columns={"rank": "peer", "peer": "rank", "start_ns": "came", "lane": "peer_lane"})
    takes = inside[inside["kind"] != Kind.SEND]
    taken = takes.sort_values("start_ns").drop_duplicates([*key, "rank", "peer"])
    taken = taken.rename(columns={"rank": "peer", "peer": "rank", "start_ns": "came", "lane": "peer_lane"})
    columns = [*key, "rank", "peer", "came", "peer_lane"]
    import pandas as pd

    rows = pd.concat([takes.merge(begun[columns], on=columns[:4], how="left"),
                      sends.merge(taken[columns], on=columns[:4], how="left")])  # fmt: skip
    known = rows["came"].notna()
    came = rows["came"].fillna(rows["end_ns"]).astype(np.int64)
    rows["end_ns"] = np.maximum(rows["start_ns"], np.minimum(rows["end_ns"], came))
    return rows.assign(peer_lane=rows["peer_lane"].where(known, 0).astype(np.int64))


# -- what the peers were doing -------------------------------------------------------------------------------------
class _Courses:
    """Spans by (attempt, rank, lane), searchable by intervals of time."""

    def __init__(self, spans: pd.DataFrame, blocked: Rows) -> None:
        """`blocked`: for each span, the index of the wait in it, or -1."""
        self._start, self._end = spans["start_ns"].to_numpy(), spans["end_ns"].to_numpy()
        self.kind, self.blocked = spans["kind"].to_numpy().astype(np.int64), blocked
        self._bounds: dict[tuple[int, int, int], tuple[int, int]] = {}
        ids = [spans[name].to_numpy() for name in ("attempt", "rank", "lane")]
        changes = np.flatnonzero(np.any([np.diff(values) != 0 for values in ids], axis=0)) + 1
        edges = [0, *changes.tolist(), len(spans)] if len(spans) else []
        for low, high in zip(edges, edges[1:], strict=False):
            self._bounds[int(ids[0][low]), int(ids[1][low]), int(ids[2][low])] = low, high

    def during(self, whose: tuple[int, int, int], begin: Rows, end: Rows) -> tuple[Rows, Rows, Rows, Rows]:
        """(question, start, end, span): the parts of `whose` spans in each interval; span -1: a gap without spans."""
        low, high = self._bounds.get(whose, (0, 0))
        first = low + np.searchsorted(self._end[low:high], begin, side="right")
        last = low + np.searchsorted(self._start[low:high], end, side="left")
        count = np.maximum(last - first, 0)
        question = np.repeat(np.arange(len(begin)), count)
        span = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        start = np.maximum(self._start[span], begin[question])
        stop = np.minimum(self._end[span], end[question])
        return self._with_gaps(question, start, stop, span, begin, end)

    @staticmethod
    def _with_gaps(
        question: Rows, start: Rows, stop: Rows, span: Rows, begin: Rows, end: Rows
    ) -> tuple[Rows, Rows, Rows, Rows]:
        every = np.arange(len(begin))
        ids = np.concatenate([every, question])
        froms, tos = np.concatenate([begin, stop]), np.concatenate([begin, start])
        order = np.lexsort((tos, ids))  # a gap lasts from a span's end (or the interval's start) to the next start
        ids, froms = ids[order], froms[order]
        following = np.append(tos[order][1:], 0)
        is_last = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, bool)
        until = np.where(is_last, end[ids], following)
        gap = until > froms
        return (
            np.concatenate([question, ids[gap]]),
            np.concatenate([start, froms[gap]]),
            np.concatenate([stop, until[gap]]),
            np.concatenate([span, np.full(int(gap.sum()), -1)]),
        )


def _resolve(spans: pd.DataFrame, waits: pd.DataFrame) -> pd.DataFrame:
    """Split the waits into pieces with root and doing (0: unknown; 1 to len(KINDS): a kind; above: nothing traced)."""
    import pandas as pd

    courses = _Courses(spans, _wait_in_span(spans, waits))
    peer, lane = waits["peer"].to_numpy(np.int64), waits["peer_lane"].to_numpy(np.int64)
    w_start, w_end = waits["start_ns"].to_numpy(np.int64), waits["end_ns"].to_numpy(np.int64)
    attempt, waiter = waits["attempt"].to_numpy(np.int64), waits["rank"].to_numpy(np.int64)
    known = np.flatnonzero(peer >= 0)
    open_ = [known, w_start[known], w_end[known], peer[known], lane[known]]  # wait, start, end, peer, its lane
    unknown = np.flatnonzero(peer < 0)
    done = [[unknown, w_start[unknown], w_end[unknown], peer[unknown], np.zeros(len(unknown), np.int64)]]
    for hop in range(HOPS):
        wait, begin, end, root, root_lane = open_
        following = []
        whose = np.stack([attempt[wait], root, root_lane], axis=1)
        for key in np.unique(whose, axis=0).tolist() if len(whose) else []:
            here = np.flatnonzero((whose == key).all(axis=1))
            question, start, stop, span = courses.during((key[0], key[1], key[2]), begin[here], end[here])
            of = wait[here][question]
            kind = np.where(span >= 0, courses.kind[span], len(KINDS) + 1)
            cause = np.where(span >= 0, courses.blocked[span], -1)
            onward = (cause >= 0) & (hop + 1 < HOPS)
            onward &= (stop > start) & (peer[cause] >= 0) & (peer[cause] != waiter[of])
            inner_end = np.where(onward, np.minimum(stop, w_end[cause]), start)
            onward &= inner_end > start
            inner_end = np.where(onward, inner_end, start)
            following.append([values[onward] for values in (of, start, inner_end, peer[cause], lane[cause])])
            left = stop > inner_end
            rest = (of, inner_end, stop, np.full(len(of), key[1]), kind)
            done.append([values[left] for values in rest])
        if not following:
            break
        open_ = [np.concatenate(columns) for columns in zip(*following, strict=True)]
    wait, start, stop, root, doing = (np.concatenate(columns) for columns in zip(*done, strict=True))
    frame = waits.iloc[wait].reset_index(drop=True)
    return frame.assign(start_ns=start, end_ns=stop, root=root, doing=pd.Series(doing, dtype=np.int64))


def _wait_in_span(spans: pd.DataFrame, waits: pd.DataFrame) -> Rows:
    """For each span, the index of the wait that begins with it, or -1."""
    keys = ["attempt", "rank", "lane", "start_ns"]
    numbered = waits[keys].assign(wait=np.arange(len(waits))).drop_duplicates(keys)
    inside = spans["communication"].astype(bool) & (spans["end_ns"] > spans["start_ns"])
    found = spans.loc[inside, keys].merge(numbered, on=keys, how="left")["wait"].fillna(-1).to_numpy(np.int64)
    blocked = np.full(len(spans), -1, np.int64)
    blocked[np.flatnonzero(inside.to_numpy())] = found
    return blocked


# -- synchronous steps ---------------------------------------------------------------------------------------------
def critical_path(course: Course, phases: pd.DataFrame, asynchronous: set[int]) -> pd.DataFrame:
    """How often each worker was last in synchronous steps, i.e. in phases not in `asynchronous`: columns phase, rank,
    steps, share, compute_s, exchange_s.

    The critical path of a synchronous step runs through the worker that finishes its backward pass last. `steps` and
    `share`: number and share of the steps in which `rank` was that worker. In these steps, compute_s is the mean time
    from the step's first span to the end of that backward pass, and exchange_s from there to the end of the step's last
    span.
    """
    import pandas as pd

    together = phases[(phases["role"] == "worker") & ~phases["phase"].isin(asynchronous)]
    workers = together[["attempt", "phase", "rank"]].drop_duplicates(ignore_index=True)
    spans = course.training[(course.training["lane"] == 0) & (course.training["step"] >= 0)]
    spans = spans.merge(workers, on=["attempt", "phase", "rank"])
    key = ["attempt", "phase", "step"]
    backward = spans[spans["kind"] == Kind.BACKWARD]
    ready = backward.groupby([*key, "rank"], as_index=False).agg(end_ns=("end_ns", "max"))
    last = ready.sort_values("end_ns").groupby(key, as_index=False).last()
    ends = spans.groupby(key, as_index=False).agg(begun=("start_ns", "min"), over=("end_ns", "max"))
    steps = last.merge(ends, on=key)
    steps["compute_s"] = (steps["end_ns"] - steps["begun"]) / 1e9
    steps["exchange_s"] = (steps["over"] - steps["end_ns"]) / 1e9
    held = steps.groupby(["phase", "rank"]).agg(
        steps=("step", "size"), compute_s=("compute_s", "mean"), exchange_s=("exchange_s", "mean")
    )
    every = pd.MultiIndex.from_frame(workers[["phase", "rank"]].drop_duplicates())
    table = pd.DataFrame(held.reindex(every).reset_index()).sort_values(["phase", "rank"], ignore_index=True)
    table["steps"] = table["steps"].fillna(0).astype(np.int64)
    table["share"] = table["steps"] / table.groupby("phase")["steps"].transform("sum").clip(lower=1)
    return table[["phase", "rank", "steps", "share", "compute_s", "exchange_s"]]
