"""Resource use of a run over time: CPU, memory, network and GPUs, by rank and by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace import Run

Numbers = NDArray[np.float64]
SHORTEST_S = 0.1  # psutil's CPU percentages over less are noise; a rank's last sample often comes this soon
RATES = {"net_in": "net_in_bytes_per_s", "net_out": "net_out_bytes_per_s"}
SUMMED = ("cpu_percent", "resident_bytes")


def usage(run: Run) -> pd.DataFrame:
    """Samples of every rank, sorted by rank and time; NaN: unknown.

    Columns node, host, rank, attempt, device, t_s, cpu_percent (of one core, for this rank's process), resident_bytes
    (of this process), net_in_bytes_per_s and net_out_bytes_per_s (whole node without loopback, since the previous
    sample; only for the node's lowest rank, as the others have the same values), gpu_percent and gpu_memory_bytes (of
    the rank's device, including use by other processes). Samples less than 0.1 s after another are left out.
    """
    import pandas as pd

    found = run.resources().sort_values(["rank", "attempt", "t_ns"], kind="stable", ignore_index=True)
    found = found.rename(columns={"cpu": "cpu_percent", "resident": "resident_bytes", "gpu": "gpu_percent"})
    found = found.rename(columns={"gpu_memory": "gpu_memory_bytes"})
    by_rank = ["rank", "attempt"]
    found = found[~(found.groupby(by_rank)["t_s"].diff() < SHORTEST_S)].reset_index(drop=True)
    known = {key: run.attributes(*key) for key in found[by_rank].drop_duplicates().itertuples(index=False, name=None)}
    of = pd.MultiIndex.from_frame(found[by_rank])
    for name, unknown in (("node", 0), ("host", ""), ("device", "")):
        found[name] = [known[key].get(name, unknown) for key in of]
    for name in ("cpu_percent", "resident_bytes", "net_in", "net_out", "gpu_percent", "gpu_memory_bytes"):
        found[name] = found[name].astype("float64").where(found[name] >= 0)
    first = ~found.duplicated(by_rank)  # the first CPU percentage covers only 50 ms
    found["cpu_percent"] = found["cpu_percent"].where(~first)
    speaks = found["rank"] == found.groupby(["node", "attempt"])["rank"].transform("min")
    elapsed = found.groupby(by_rank)["t_s"].diff()
    for name, rate in RATES.items():
        grown = found.groupby(by_rank)[name].diff()
        found[rate] = (grown / elapsed).where(speaks & (grown >= 0))
    names = ["node", "host", *by_rank, "device", "t_s", *SUMMED, *RATES.values(), "gpu_percent", "gpu_memory_bytes"]
    return found[names]


def node_usage(samples: pd.DataFrame, moments: int = 200) -> pd.DataFrame:
    """`usage` per node: node, host, t_s, cpu_percent and resident_bytes, summed over the node's ranks.

    Ranks take their samples at different times, so each rank's values are interpolated at `moments` equally spaced
    times. More than one sampling interval before its first sample or after its last, a rank adds nothing. A node's
    value is NaN where none of its ranks has one.
    """
    import pandas as pd

    parts = []
    apart = np.nan_to_num(samples.groupby(["rank", "attempt"])["t_s"].diff().median())
    for (node, host), mine in samples.groupby(["node", "host"], sort=True):
        t = np.linspace(mine["t_s"].min(), mine["t_s"].max(), moments)
        columns = {name: _sum_over_ranks(mine, name, t, apart) for name in SUMMED}
        parts.append(pd.DataFrame({"node": node, "host": host, "t_s": t, **columns}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["node", "host", "t_s", *SUMMED])


def _sum_over_ranks(samples: pd.DataFrame, name: str, t: Numbers, apart: float) -> Numbers:
    total, anybody = np.zeros(len(t)), np.zeros(len(t), bool)
    for _, mine in samples.dropna(subset=[name]).groupby(["rank", "attempt"]):
        at, value = mine["t_s"].to_numpy(), mine[name].to_numpy()
        there = (t >= at[0] - apart) & (t <= at[-1] + apart)
        total[there] += np.interp(t[there], at, value)
        anybody |= there
    return np.where(anybody, total, np.nan)
