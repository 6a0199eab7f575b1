"""How late gradients are on real ranks and in the simulator. Writes that section of docs/simulation.md.

    python analysis/late_gradients.py

A server and three asynchronous workers, of which the last is slower (`debug.slow`). All three are slowed so much that
they sleep most of the time: so it does not matter how many cores this machine has. Half a minute.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from hpctrain.hosts import Description, HostGroup
from hpctrain.job import Job
from hpctrain.simulate.command import measure_job
from hpctrain.simulate.simulation import Simulation
from hpctrain.trace import open_run

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "simulation.md"
RANKS, SKIPPED = 4, 5  # steps of each rank that do not count
KEYS = [
    "strategy={name='parameter_server', mode='async'}", "threads=1", "train.steps=150", "train.batch_size=16",
    "data.validation=0", "train.evaluate_every={fraction=1.0}", "trace.report=false",
    "debug.slow={0=10, 1=10, 2=40}",
]  # fmt: skip
BEGIN, END = "<!-- late gradients: begin -->", "<!-- late gradients: end -->"
HEAD = """
| worker | time per step | mean staleness, real | simulated | 90 % are at most, real | simulated |
|---|---|---|---|---|---|"""


def real(folder: str) -> Path:
    """The folder of a run by real ranks."""
    command = [sys.executable, "-m", "hpctrain", "run", "-n", str(RANKS), str(ROOT / "jobs" / "digits.toml")]
    subprocess.run([*command, *KEYS, f"output={folder}/real"], check=True, timeout=200, stdout=subprocess.DEVNULL)
    return next(Path(folder, "real").iterdir())


def simulated(folder: str) -> Path:
    """The folder of the same run in the simulator."""
    job = Job.load(ROOT / "jobs" / "digits.toml").override([*KEYS, f"output={folder}/simulated"])
    cluster = Description(hosts=[HostGroup(count=1, ranks=RANKS)])
    known = measure_job(job.override(["debug=default"]), [0] * RANKS)
    return Simulation(job, cluster, RANKS, learn=True).run(known).folder


def late(folder: Path) -> pd.DataFrame:
    """The gradients that count: rank and staleness."""
    steps = open_run(folder).steps()
    return steps[(steps["step"] >= SKIPPED) & (steps["t_s"] < 0.9 * steps["t_s"].max())]


def rows(found: list[pd.DataFrame]) -> Iterator[str]:
    """Of the table; `found`: real, then simulated."""
    for rank, times in enumerate((1, 1, 4)):
        own = [each[each["rank"] == rank]["staleness_max"] for each in found]
        mean, most = ([f"{value:.2f}" for value in values] for values in (
            [each.mean() for each in own], [each.quantile(0.9) for each in own]
        ))  # fmt: skip
        yield f"| {rank} | {times} | {' | '.join(mean)} | {' | '.join(most)} |"


def main() -> None:
    """The program."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-late-") as folder:
        table = "\n".join([HEAD.strip("\n"), *rows([late(real(folder)), late(simulated(folder))])])
    text = DOCUMENT.read_text()
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", re.DOTALL)
    DOCUMENT.write_text(between.sub(lambda _: f"{table}\n", text))
    print(f"wrote {DOCUMENT}", file=sys.stderr)


if __name__ == "__main__":
    main()
