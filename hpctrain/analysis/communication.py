"""What the ranks sent to each other, how fast, and how much of it was hidden behind computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.trace.events import MeasuredLink, chosen
from hpctrain.trace.schema import Kind

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.analysis.course import Course
    from hpctrain.trace.reader import Run

TOGETHER = -1


def traffic(course: Course, phases: pd.DataFrame) -> pd.DataFrame:
    """A row per sender and receiver: columns source, destination, messages, bytes, seconds, bytes_per_s.

    `seconds`: from start to arrival, summed over the messages whose receivers were already waiting when they started
    (for others the arrival is unknown, because no receiver was checking for it); `bytes_per_s`: of these messages.
    Destination -1: collectives of the MPI library and sums over shared memory, with the bytes of the rank's own
    buffers, timed from the last rank's arrival. Messages, bytes and seconds are divided by `course.share`.
    """
    import pandas as pd

    spans, key = course.training, ["attempt", "id"]
    numbered = spans[spans["id"] >= 0]
    sends = numbered[(numbered["kind"] == Kind.SEND) & (numbered["peer"] >= 0)].sort_values("start_ns")
    sends = sends.drop_duplicates([*key, "rank", "peer"])
    takes = numbered[(numbered["kind"] == Kind.RECV) & (numbered["peer"] >= 0)].sort_values("start_ns")
    takes = takes.drop_duplicates([*key, "rank", "peer"], keep="last")
    takes = takes[[*key, "rank", "peer", "start_ns", "end_ns"]].rename(
        columns={"rank": "peer", "peer": "rank", "start_ns": "looked", "end_ns": "came"}
    )
    pairs = sends.merge(takes, on=[*key, "rank", "peer"], how="left")
    flight = (pairs["came"] - pairs["start_ns"]) / 1e9
    waited = (pairs["looked"] <= pairs["start_ns"]) & (flight > 0)
    pairs["seconds"], pairs["timed"] = flight.where(waited, 0.0), pairs["bytes"].where(waited, 0)
    messages = pairs.rename(columns={"rank": "source", "peer": "destination"})
    together = _together(spans.assign(works=_works(spans, phases)))
    both = pd.concat([messages, together], ignore_index=True)
    table = both.groupby(["source", "destination"], as_index=False).agg(
        messages=("bytes", "size"), bytes=("bytes", "sum"), seconds=("seconds", "sum"), timed=("timed", "sum")
    )
    table["bytes_per_s"] = (table.pop("timed") / table["seconds"]).where(table["seconds"] > 0)
    for name in ("messages", "bytes", "seconds"):
        table[name] = table[name] / course.share
    return table.astype({"messages": np.int64, "bytes": np.int64})


def volumes(course: Course, nodes: Mapping[int, int]) -> pd.DataFrame:
    """A row per rank: columns rank, node, sent, received, sent_between, received_between, collective,
    collective_received; all but the first two in bytes. `nodes`: the node of each rank.

    `sent`, `received`: by messages, so what a rank sends to all the others counts at each receiver; `..._between`: of
    these to and from ranks on other nodes. `collective`: the rank's buffers in the MPI library's all-reduces and
    all-gathers; `collective_received`: what a rank receives of these at least, in a ring of n ranks (n - 1) / n of an
    all-gather and twice that of an all-reduce. How the library moves them is not known. All are divided by
    `course.share`.
    """
    import pandas as pd

    spans = course.training
    messages = spans[(spans["peer"] >= 0) & (spans["id"] >= 0) & (spans["bytes"] > 0)]
    between = messages["rank"].map(nodes) != messages["peer"].map(nodes)
    sends, takes = messages["kind"] == Kind.SEND, messages["kind"] == Kind.RECV
    one = spans[(spans["peer"] < 0) & (spans["id"] >= 0) & spans["communication"]]
    one = one[one["kind"].isin([Kind.REDUCE, Kind.RECV]) & (one["bytes"] > 0)]
    ranks = one.groupby(["attempt", "id"])["rank"].transform("nunique")
    least = one["bytes"] * (ranks - 1) / ranks * np.where(one["kind"] == Kind.REDUCE, 2, 1)
    parts = {
        "sent": messages[sends],
        "received": messages[takes],
        "sent_between": messages[sends & between],
        "received_between": messages[takes & between],
        "collective": one,
        "collective_received": one.assign(bytes=least),
    }
    table = pd.DataFrame({"rank": sorted(nodes), "node": [nodes[rank] for rank in sorted(nodes)]})
    for name, rows in parts.items():
        found = rows.groupby("rank")["bytes"].sum() / course.share
        table[name] = table["rank"].map(found).fillna(0).round().astype(np.int64)
    return table


def _works(spans: pd.DataFrame, phases: pd.DataFrame) -> pd.Series[bool]:
    """Whether each span is a worker's, and not of a colocated server's thread (lane 1)."""
    import pandas as pd

    roles = phases[["attempt", "phase", "rank", "role"]].drop_duplicates(["attempt", "phase", "rank"])
    role = spans[["attempt", "phase", "rank"]].merge(roles, how="left")["role"]
    return pd.Series((role.to_numpy() == "worker") & (spans["lane"].to_numpy() != 1), index=spans.index)


def _together(spans: pd.DataFrame) -> pd.DataFrame:
    """Columns source, destination, bytes, seconds, timed of operations without a single receiver.

    Sums of a server are left out: their input was sent to it.
    """
    alone = spans[(spans["peer"] < 0) & spans["kind"].isin([Kind.SEND, Kind.RECV, Kind.REDUCE])]
    alone = alone[(alone["kind"] != Kind.REDUCE) | (alone["id"] >= 0) | alone["works"]]
    last = alone[alone["id"] >= 0].groupby(["attempt", "id"], as_index=False).agg(came=("start_ns", "max"))
    rows = alone.merge(last, on=["attempt", "id"], how="left")
    begun = np.maximum(rows["start_ns"], rows["came"].fillna(0))
    seconds = ((rows["end_ns"] - begun) / 1e9).clip(lower=0.0)
    rows = rows.assign(seconds=seconds, timed=rows["bytes"], source=rows["rank"], destination=TOGETHER)
    return rows[rows["bytes"] > 0][["source", "destination", "bytes", "seconds", "timed"]]


def links(run: Run) -> pd.DataFrame:
    """Columns rank, peer, same_node, latency_s, bytes_per_s: measured at the start of the run."""
    import pandas as pd

    rows = [(rank, *vars(link).values()) for rank, _, _, link in chosen(run.events(), MeasuredLink)]
    frame = pd.DataFrame(rows, columns=["rank", "peer", "same_node", "latency_s", "bytes_per_s"])
    return frame.drop_duplicates(["rank", "peer"], ignore_index=True)


def overlap(course: Course) -> pd.DataFrame:
    """Overlap of non-blocking sends and all-reduces: columns phase, rank, in_flight_s, blocked_s, hidden.

    in_flight_s: from an operation's start to the end of its rank's wait for it (operations that were already complete
    and left no second span do not count); blocked_s: how long the rank was blocked in it; `hidden`: 1 - blocked / in
    flight.
    """
    spans = course.training
    started = spans[spans["kind"].isin([Kind.SEND, Kind.REDUCE]) & (spans["id"] >= 0)]
    key = ["attempt", "phase", "rank", "id", "peer"]
    started = started.assign(took=started["end_ns"] - started["start_ns"], opened=started["piece"] == 0)
    found = started.groupby(key, as_index=False).agg(
        begun=("start_ns", "min"), over=("end_ns", "max"), took=("took", "sum"), opened=("opened", "sum")
    )
    found = found[found["opened"] > 1]  # a blocking operation cut by others has several pieces but one first piece
    found["in_flight_s"] = (found["over"] - found["begun"]) / 1e9 / course.share
    found["blocked_s"] = found["took"] / 1e9 / course.share
    table = found.groupby(["phase", "rank"], as_index=False)[["in_flight_s", "blocked_s"]].sum()
    table["hidden"] = 1.0 - table["blocked_s"] / table["in_flight_s"]
    return table
