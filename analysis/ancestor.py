"""What the study found that this project began with, simulated here. Writes docs/ancestor.md, in some minutes.

    python analysis/ancestor.py

LeNet-5 on MNIST with Adam 0.01 and an asynchronous server: with undivided rates training falls apart as workers are
added; divided ones help. And what the study's model says that exchanges take, beside what they take in the simulator.
MNIST must be in data/mnist (or below HPCTRAIN_DATA).
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch

from hpctrain.hosts import Description, HostGroup, HostLink
from hpctrain.job import Job
from hpctrain.models.lenet5 import lenet5
from hpctrain.simulate.calibration import Calibration, LinkCosts, MeasuredCost, ModelCosts
from hpctrain.simulate.simulation import Simulated, Simulation
from hpctrain.simulate.summary import predict

ROOT = Path(__file__).parent.parent
JOB, DOCUMENT = ROOT / "jobs" / "study_mnist.toml", ROOT / "docs" / "ancestor.md"
PARAMETERS, MBIT, BATCH = 61_706, 10.0, 64
PASS_S, SPREAD = 10e-3, 0.3  # of a forward and backward pass
GRADIENTS = 1200  # of all workers together
SEEDS = (0, 1, 2)
FAST = 1000.0
CASES = ((2, FAST), (4, FAST), (6, FAST), (8, FAST), (8, MBIT))  # workers, Mbit/s
RATES = {"undivided": "none", "by W^0.75 (the default)": "auto", "by W": "workers"}
PUBLISHED = {2: 0.96, 4: 0.86, 6: 0.47, 8: 0.08}
HEAD = f"""# The study that this project began with

Remade by `python analysis/ancestor.py`. The study (lminervino18/oxidized-neural-orchestra) trained LeNet-5, with
61,706 parameters, on MNIST over hosts with links of 10 Mbit/s: Adam with a rate of 0.01, 64 samples per worker and
step. Everything here is simulated.

## Asynchronous workers and the learning rate

Accuracy on the test images after {GRADIENTS:,} gradients of all W workers together, with gradients computed
(`hpctrain simulate --learn`), over an asynchronous server: the mean of {len(SEEDS)} seeds, and the lowest. The columns
say what `strategy.lr_per_update` divides the rate by. Passes vary by {100 * SPREAD:.0f} %. The study's own figures are
after 48 epochs, with one exchange per epoch.
"""
FOUND = """
- With undivided rates, training falls apart as workers are added, as in the study.
- Divided by W, it learns everywhere. The default suits Adam's usual rates better (asynchrony.md), but with 8 workers
  this rate is too fast for it: some seeds fall apart. Set `strategy.lr_per_update = "workers"` there.
"""
DELAYS = """
## What an exchange takes

Of S bytes of parameters among W workers and V servers, over links of R bytes per second, where computing takes no time:
the study's formulas beside a simulated step.
"""


@dataclass(frozen=True)
class Exchange:
    """One way to agree. `formula`: as the study has it; `links`: how many S / R that is."""

    name: str
    formula: str
    links: float
    workers: int
    servers: int
    keys: tuple[str, ...]


def exchanges() -> Iterator[Exchange]:
    """What is compared."""
    server = ("strategy={name='parameter_server', mode='sync'}",)
    for workers in (2, 4, 8):
        yield Exchange("one server", "2 W S / R", 2 * workers, workers, 1, server)
    for workers, servers in ((4, 2), (8, 4)):
        several = (*server, f"strategy.servers={servers}")
        yield Exchange(f"{servers} servers", "2 (W / V) S / R", 2 * workers / servers, workers, servers, several)
    for workers in (2, 4, 8):
        ring = ("strategy={name='all_reduce', exchange='message', algorithm='ring'}",)
        yield Exchange("ring", "2 (1 - 1 / W) S / R", 2 * (1 - 1 / workers), workers, 0, ring)


def calibration(seconds: float, spread: float) -> Calibration:
    """Passes that take that long in all; nothing else takes any time, and links lose nothing."""
    layers = sum(1 for _ in lenet5().parameters())
    spans = dict.fromkeys(("data", "reduce", "update", "encode", "decode", "send"), MeasuredCost())
    parts = (MeasuredCost(fixed_s=seconds * part, most=BATCH, spread=spread) for part in (1 / 3, 2 / 3))
    forward, backward = parts
    model = ModelCosts(
        name="lenet5", parameters=PARAMETERS, forward=forward, backward=backward,
        order=list(reversed(range(layers))), shares=[1 / layers] * layers,
    )  # fmt: skip
    free = LinkCosts(efficiency=1.0)
    return Calibration(source="assumed", model=model, spans=spans, between=free, within=free)


def simulated(keys: list[str], ranks: int, mbit: float, known: Calibration, learn: bool, folder: str) -> Simulated:
    """A job on hosts like the study's."""
    cluster = Description(hosts=[HostGroup(count=ranks)], link=HostLink(mbit_per_s=mbit, latency_ms=0.0))
    job = Job.load(JOB).override([f"train.batch_size={BATCH}", "threads=1", "trace.report=false", *keys])
    return Simulation(job.override([f"output={folder}"]), cluster, ranks, learn=learn).run(known)


def trained(workers: int, mbit: float, rates: str, seed: int, folder: str) -> tuple[float, list[int]]:
    """Accuracy on the test images at the end, and the staleness of all gradients."""
    keys = [
        "optimizer={name='Adam', lr=0.01}", f"train.steps={GRADIENTS // workers}", f"seed={seed}",
        "train.evaluate_every={fraction=1.0}",
        f"strategy={{name='parameter_server', mode='async', lr_per_update='{rates}'}}",
    ]  # fmt: skip
    found = simulated(keys, workers + 1, mbit, calibration(PASS_S, SPREAD), True, folder)
    with (found.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"]]
    return float(rows[-1]["metric"]), [late for rank in found.workers for late in found.tallies[rank].staleness]


def learning(folder: str) -> Iterator[str]:
    """The table of accuracies."""
    yield "\n| W | links | staleness | " + " | ".join(RATES) + " | the study |"
    yield "|---|---|---|" + "---|" * (len(RATES) + 1)
    for workers, mbit in CASES:
        print(f"learning, {workers} workers", file=sys.stderr, flush=True)
        cells, late = [], list[int]()
        for rates in RATES.values():
            found = [trained(workers, mbit, rates, seed, folder) for seed in SEEDS]
            late += [value for _, values in found for value in values]
            cells.append(f"{fmean(value for value, _ in found):.2f} ({min(value for value, _ in found):.2f})")
        links = f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"
        stale = f"{fmean(late):.1f} +- {pstdev(late):.1f}"
        yield f"| {workers} | {links} | {stale} | {' | '.join(cells)} | {PUBLISHED[workers]} |"


def delays(folder: str) -> Iterator[str]:
    """The table of exchanges."""
    yield "\n| exchange | W | formula | by it, ms | simulated, ms | difference |"
    yield "|---|---|---|---|---|---|"
    one = PARAMETERS * 4 / (MBIT * 1e6 / 8)
    known = calibration(1e-9, 0.0)
    for each in exchanges():
        print(f"exchange, {each.name}, {each.workers} workers", file=sys.stderr)
        keys = [*each.keys, "train.steps=12"]
        found = simulated(keys, each.workers + each.servers, MBIT, known, False, folder)
        step, wanted = predict(found, known).step, each.links * one
        yield (
            f"| {each.name} | {each.workers} | {each.formula} | {1e3 * wanted:.1f} | {1e3 * step:.1f} | "
            f"{100 * (step / wanted - 1):+.1f} % |"
        )


def main() -> None:
    """The program."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpctrain-ancestor-") as folder:
        lines = [HEAD.rstrip(), *learning(folder), FOUND.rstrip(), DELAYS.rstrip(), *delays(folder)]
    DOCUMENT.write_text("\n".join(lines) + "\n")
    print(f"wrote {DOCUMENT}", file=sys.stderr)


if __name__ == "__main__":
    main()
