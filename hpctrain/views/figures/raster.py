"""Level of detail for timelines: for every lane, the share of each kind in each column of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.trace.schema import KINDS

if TYPE_CHECKING:
    from hpctrain.trace import Run

Shares = NDArray[np.float64]


def kind_shares(run: Run, start_ns: int, end_ns: int, columns: int) -> dict[tuple[int, int], Shares]:
    """{(rank, lane): shares by (index in KINDS, column)} for the time from `start_ns` to `end_ns`, in equal columns.

    Reads the spans one block at a time: 10^6 of them take about a second and almost no memory.
    """
    found: dict[tuple[int, int], Shares] = {}
    width = max(1, end_ns - start_ns) / columns
    for rank, _, block in run.blocks("spans"):
        for lane in np.unique(block["lane"]):
            own = block[block["lane"] == lane]
            total = found.setdefault((rank, int(lane)), np.zeros((len(KINDS), columns)))
            begin, end = ((np.clip(own[name], start_ns, end_ns) - start_ns) / width for name in ("start_ns", "end_ns"))
            _spread(total, own["kind"].astype(np.int64) - 1, begin, end)
    return found


def _spread(total: Shares, kind: Any, begin: Any, end: Any) -> None:
    """Add spans, with times in columns, to `total`: partial shares in their first and last columns, 1 in between."""
    kinds, columns = total.shape
    first = np.minimum(begin.astype(np.int64), columns - 1)
    last = np.minimum(end.astype(np.int64), columns - 1)
    several = last > first
    rise = np.zeros((kinds, columns + 1))
    np.add.at(total, (kind, first), np.where(several, first + 1 - begin, end - begin))
    np.add.at(total, (kind[several], last[several]), (end - last)[several])
    np.add.at(rise, (kind[several], first[several] + 1), 1.0)
    np.add.at(rise, (kind[several], last[several]), -1.0)
    total += np.cumsum(rise, axis=1)[:, :columns]


def paint(shares: Shares, order: list[int], height: int) -> NDArray[np.int64]:
    """Turn shares into a picture of `height` x columns pixels: kind indices, stacked upwards in `order`; -1: empty."""
    reach = np.cumsum(shares[order], axis=0)  # (kind, column): upper edge of each kind
    level = (np.arange(height)[::-1] + 0.5)[:, None, None] / height
    above = (reach[None] < level).sum(axis=1)  # number of kinds that end below each pixel
    return np.append(np.array(order), -1)[above]
