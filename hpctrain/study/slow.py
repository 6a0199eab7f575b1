"""One slow host among several of the laboratory: what each strategy makes of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hpctrain.errors import ClusterError
from hpctrain.filenames import METRICS
from hpctrain.lab import command
from hpctrain.study.case import Variant


def train_in_laboratory(cluster: Path, file: Path, keys: Sequence[str], row: Variant) -> dict[str, Any]:
    """Train the job once on the cluster's hosts, which takes root. Returns {"seconds": training time, "metric", "loss",
    "samples"}. Raises ClusterError if the run fails."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-study-") as folder:
        words = [str(file), *keys, *row.keys, f"output={folder}", "trace.enabled=false", "threads=1"]
        status = command.run(cluster, [sys.executable, "-m", "hpctrain", "train", *words], None)
        tables = list(Path(folder).glob(f"*/{METRICS}"))
        if status or len(tables) != 1:
            raise ClusterError(f"study: {row.name} on {cluster.name} ended with status {status}")
        last = pd.read_csv(tables[0]).iloc[-1]
        return {key: float(last[key]) for key in ("seconds", "samples", "loss", "metric") if key in last}
