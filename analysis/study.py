"""Every strategy and codec on one job at equal samples: what it costs, what it reaches. Writes docs/study.md.

    python analysis/study.py                    run what docs/study/ lacks, then write the page
    python analysis/study.py --only topk        only the runs whose names have that in them (a shell pattern)
    python analysis/study.py --minutes 10       begin no run after ten minutes; start it again to go on
    python analysis/study.py --processes 2      two runs at a time
    python analysis/study.py --host             measure a step of two workers on this host (alone on the machine),
                                                or with --only of some rows
    python analysis/study.py --slow             measure one slow host of four in the laboratory (root, alone)
    python analysis/study.py --quick            a short run of each kind of row, and its page, in a temporary folder
    python analysis/study.py --write            only write the page

About three hours on one core. It can be interrupted: each run leaves a file in docs/study/. MNIST must be in
data/mnist, tinyshakespeare in data/tinyshakespeare and BCCD in data/bccd_voc/BCCD (or below HPCTRAIN_DATA).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from hpctrain import launcher
from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import connect
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.study import host
from hpctrain.study.case import Case, Setting, Variant, cases
from hpctrain.study.kept import Kept
from hpctrain.study.page import Prose, Study, write
from hpctrain.study.runs import chosen, run_missing
from hpctrain.study.slow import train_in_laboratory
from hpctrain.study.table import Wanted

ROOT = Path(__file__).parent.parent
DOCUMENT, KEPT = ROOT / "docs" / "study.md", ROOT / "docs" / "study"
BASE = "all_reduce"


def rows(*given: tuple[str, ...]) -> dict[str, Variant]:
    """By name. Each: the name, the strategy, and its keys without "strategy."; those of other tables in full."""
    tables = ("optimizer", "train.", "data.")
    found = {}
    for name, strategy, *keys in given:
        full = [key if key.startswith(tables) else f"strategy.{key}" for key in keys]
        found[name] = Variant(name, (f"strategy={strategy}", *full))
    return found


# A row is one line.
EF = ("optimizer.momentum=0.0", "optimizer.lr=0.3")  # error feedback: what is left out comes later, as momentum does
HALF_EACH = ("optimizer.momentum=0.0", "optimizer.lr=0.2")  # ACP-SGD leaves more for later than PowerSGD
SPARSE = ("outer_momentum=0.0", "outer_lr=1.0", "codec={name='topk', keep=0.1, bits=2, decay=0.95}")
SIGNS = "optimizer={name='SignSGD', lr=0.001, schedule={name='cosine', warmup={fraction=0.05}}}"
NO_MOMENTUM = ("optimizer.momentum=0.0",)  # of the optimizer, because the codec has one
FEW_ROUNDS = ("outer_momentum=0.5", "optimizer.lr=0.03")
ROWS = rows(
    (BASE, "all_reduce"),
    ("all_reduce, rate 0.3", "all_reduce", *EF),
    ("bfloat16", "all_reduce", "codec=bfloat16"),
    ("float16", "all_reduce", "codec=float16"),
    ("int8", "all_reduce", "codec=int8"),
    ("int4", "all_reduce", "codec=int4"),
    ("sign", "all_reduce", "codec=sign", *EF),
    ("int8, block 32768", "all_reduce", "codec={name='int8', block=32768}"),
    ("sign, block 32768", "all_reduce", "codec={name='sign', block=32768}", *EF),
    ("sign, majority", "all_reduce", "codec={name='sign', majority=true}", *EF),
    ("topk 1 %", "all_reduce", "codec=topk", *EF),
    ("topk 1 %, 2 bits", "all_reduce", "codec={name='topk', bits=2}", *EF),
    ("topk 1 %, DGC", "all_reduce", "codec={name='topk', momentum=0.9, warmup={samples=12000}}", *NO_MOMENTUM),
    ("topk 1 %, EF21-SGDM", "all_reduce", "codec={name='topk', feedback='ef21'}", *EF),
    ("demo 32 of 4096", "all_reduce", "codec=demo", *EF),
    ("DeMo", "all_reduce", "codec={name='demo', decay=0.999}", SIGNS),
    ("powersgd rank 2", "all_reduce", "codec=powersgd"),
    ("powersgd rank 4", "all_reduce", "codec={name='powersgd', rank=4}"),
    ("acp rank 2", "all_reduce", "codec=acp", *HALF_EACH),
    ("acp rank 4", "all_reduce", "codec={name='acp', rank=4}", *HALF_EACH),
    ("server, sync", "parameter_server", "mode=sync"),
    ("server, sync, int8", "parameter_server", "mode=sync", "codec=int8"),
    ("server, sync, topk 1 %", "parameter_server", "mode=sync", "codec=topk", *EF),
    ("server, sync, topk, pulls int8", "parameter_server", "mode=sync", "codec=topk", "pull=int8", *EF),
    ("server, async", "parameter_server", "mode=async"),
    ("server, async, int8", "parameter_server", "mode=async", "codec=int8"),
    ("server, async, topk 1 %", "parameter_server", "mode=async", "codec=topk", *EF),
    ("server, bounded", "parameter_server", "mode=bounded"),
    ("server, bounded, int8", "parameter_server", "mode=bounded", "codec=int8"),
    ("server, bounded, topk 1 %", "parameter_server", "mode=bounded", "codec=topk", *EF),
    ("local_sgd H=8", "local_sgd", "every=8"),
    ("local_sgd H=8, int8", "local_sgd", "every=8", "codec=int8"),
    ("diloco H=50", "diloco", "every=50", *FEW_ROUNDS),
    ("diloco H=50, int4", "diloco", "every=50", *FEW_ROUNDS, "codec=int4"),
    ("streaming diloco H=48", "streaming_diloco", "every=48", *FEW_ROUNDS),
    ("sparseloco H=30", "diloco", "every=30", "optimizer.lr=0.03", *SPARSE),
)  # fmt: skip
IMPORTANT = (BASE, "int8", "sign", "topk 1 %", "powersgd rank 2", "server, async", "local_sgd H=8", "diloco H=50")
CHAR = rows(
    (BASE, "all_reduce"),
    ("int8", "all_reduce", "codec=int8"),
    ("topk 1 %", "all_reduce", "codec=topk"),
    ("powersgd rank 2", "all_reduce", "codec=powersgd"),
    ("local_sgd H=8", "local_sgd", "every=8"),
    ("diloco H=50", "diloco", "every=50", "outer_momentum=0.5"),
    ("diloco H=50, int4", "diloco", "every=50", "outer_momentum=0.5", "codec=int4"),
    ("diloco H=50, MuonAdamW", "diloco", "every=50", "outer_momentum=0.5", "optimizer.name=MuonAdamW"),
    ("sparseloco H=30", "diloco", "every=30", *SPARSE),
)  # fmt: skip
FILE, CHARS, CELLS = (ROOT / "jobs" / f"study_{name}.toml" for name in ("mnist", "char", "bccd"))
MNIST = Setting("mnist8", "LeNet-5 on MNIST, 8 workers", FILE, 8, ROWS, BASE)
FEW = {name: ROWS[name] for name in IMPORTANT}
SOME = (BASE, "all_reduce, rate 0.3", "int8", "sign", "topk 1 %", "powersgd rank 2", "local_sgd H=8")
CELL_ROWS = {name: ROWS[name] for name in SOME}
CELL_ROWS |= rows(("powersgd rank 2, rate 0.3", "all_reduce", "codec=powersgd", *EF))
SETTINGS = (
    MNIST,
    Setting("char8", "Transformer on tinyshakespeare, 8 workers", CHARS, 8, CHAR, BASE, "bits per character", "loss"),
    Setting("bccd8", "Narrow ResNet on BCCD's cells, 8 workers", CELLS, 8, CELL_ROWS, BASE, "balanced accuracy"),
    Setting("mnist4", "LeNet-5 on MNIST, 4 workers", FILE, 4, FEW, BASE, keys=("train.batch_size=32",)),
    Setting("mnist16", "LeNet-5 on MNIST, 16 workers", FILE, 16, FEW, BASE, keys=("train.batch_size=8",)),
)
SLOW = rows(
    (BASE, "all_reduce"),
    ("all_reduce, balance", "all_reduce", "balance=throughput"),
    ("server, sync, 1 backup worker", "parameter_server", "mode=sync", "colocated=true", "backup_workers=1"),
    ("server, bounded", "parameter_server", "mode=bounded", "colocated=true"),
    ("server, async", "parameter_server", "mode=async", "colocated=true"),
    ("local_sgd H=8", "local_sgd", "every=8"),
    ("local_sgd H=8, balance", "local_sgd", "every=8", "balance=throughput"),
    ("diloco H=50", "diloco", "every=50", *FEW_ROUNDS),
    ("diloco H=50, balance", "diloco", "every=50", "balance=throughput", *FEW_ROUNDS),
)  # fmt: skip
SLOW_CLUSTER, SLOW_KEYS = ROOT / "clusters" / "slow4.toml", ("data.limit=12800", "train.epochs=1", "seed=0")
TARGETS = (
    ("mnist8", Wanted("int8", "points", 0.5)),
    ("mnist8", Wanted("sign", "points", 0.5)),
    ("mnist8", Wanted("topk 1 %", "points", 0.5)),
    ("mnist8", Wanted("demo 32 of 4096", "points", 0.5)),
    ("mnist8", Wanted("powersgd rank 2", "points", 0.5)),
    ("mnist8", Wanted("int8", "payload", 4)),
    ("mnist8", Wanted("int8, block 32768", "points", 0.5)),
    ("mnist8", Wanted("int8, block 32768", "payload", 4)),
    ("mnist8", Wanted("sign", "payload", 32)),
    ("mnist8", Wanted("sign, block 32768", "points", 0.5)),
    ("mnist8", Wanted("sign, block 32768", "payload", 32)),
    ("mnist8", Wanted("topk 1 %", "payload", 50)),
    ("mnist8", Wanted("local_sgd H=8", "points", 0.5)),
    ("mnist8", Wanted("local_sgd H=8", "payload", 8)),
    ("char8", Wanted("diloco H=50", "loss", 0.01)),
    ("char8", Wanted("diloco H=50", "payload", 50)),
    ("mnist8", Wanted("sparseloco H=30", "points", 0.5)),
    ("mnist8", Wanted("sparseloco H=30", "payload", 500)),
    ("char8", Wanted("sparseloco H=30", "loss", 0.01)),
    ("char8", Wanted("sparseloco H=30", "payload", 500)),
)
SHAPES = {
    "LeNet-5": Job.load(FILE),
    "MLP 784-1024-1024-10": Job.load(FILE, ["model={name='mlp', inputs=784, hidden=[1024, 1024]}"]),
    "transformer": Job.load(CHARS),
    "ResNet-18": Job.load(FILE, ["model=resnet18"]),
}
STUDY = Study(SETTINGS, TARGETS, Kept(KEPT), MNIST, SLOW, SHAPES)
QUICK = ("data.limit=1700", "train.batch_size=4", "train.epochs=1")  # 54 steps of 8 workers: rounds have up to 50
QUICK_ROWS = {  # a row of each kind
    "mnist8": (BASE, "topk 1 %", "powersgd rank 2", "server, sync, topk, pulls int8", "server, async", "local_sgd H=8",
               "diloco H=50, int4", "streaming diloco H=48"),
    "char8": (BASE,),
    "bccd8": (BASE,),
}  # fmt: skip
PROSE = Prose(**tomllib.loads((ROOT / "analysis" / "study.toml").read_text()))


def measure_host(study: Study, ranks: Communicator | None, only: str) -> None:
    """One repetition more of the rows whose names have the pattern `only`, and medians of all. `ranks`: of the MPI job
    that does it; None: start one."""
    if ranks is None:
        this = [sys.executable, __file__, "--host", "--ranks", "--only", only]
        if status := launcher.run(host.WORKERS + 1, this):
            raise SystemExit(status)
        return
    setting = replace(MNIST, workers=host.WORKERS)
    found = host.milliseconds(ranks, chosen([Case(setting, row, 0) for row in setting.rows.values()], only))
    if ranks.rank == 0:
        before = study.measured("host", setting.rows)
        runs = {row: [*before.get(row, {}).get("runs", []), ms] for row, ms in found.items()}
        now = {row: {"ms": median(each), "runs": each} for row, each in runs.items()}
        study.note("host", {**before, **now}, setting.rows)


def measure_slow(study: Study) -> None:
    """All rows that have not been measured."""
    for name, row in SLOW.items():
        if name not in (found := study.measured("slow", SLOW)):
            found[name] = train_in_laboratory(SLOW_CLUSTER, MNIST.file, SLOW_KEYS, row)
            study.note("slow", found, SLOW)


def quick(folder: Path) -> Study:
    """A row of each kind (QUICK_ROWS) once, with a few steps: no numbers to keep."""
    short = []
    for setting in SETTINGS:
        rows = {name: setting.rows[name] for name in QUICK_ROWS.get(setting.name, ())}
        short.append(replace(setting, rows=rows, seeds=1, keys=(*setting.keys, *QUICK)))
    return replace(STUDY, settings=[setting for setting in short if setting.rows], kept=Kept(folder))


def run(study: Study, only: str, minutes: float, processes: int, part: str) -> bool:
    """Run what is missing; whether all of it is there now. `part`: of several processes, "0/2" the first of two."""
    if processes > 1:
        this = [sys.executable, __file__, "--only", only, "--minutes", str(minutes)]
        parts = [subprocess.Popen([*this, "--part", f"{index}/{processes}"]) for index in range(processes)]
        statuses = [part.wait() for part in parts]
        return not any(statuses)
    index, count = map(int, part.split("/"))
    todo = chosen(cases(study.settings), only)
    return run_missing(todo, study.kept, minutes * 60, lambda line: print(line, flush=True), (index, count))


def main() -> int:
    """Run as the command line says, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="runs whose names have this in them")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--host", action="store_true", help="measure a step on this host, once more")
    action.add_argument("--slow", action="store_true", help="measure what a slow host costs")
    action.add_argument("--quick", action="store_true", help="a few short runs, not kept")
    action.add_argument("--write", action="store_true", help="run nothing")
    parser.add_argument("--ranks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="hpctrain-study-") as folder:
            study = quick(Path(folder) / "study")
            done = run(study, options.only, options.minutes, 1, "0/1")
            write(study, PROSE, Path(folder) / "study.md")
        return int(not done)
    done = True
    if options.host:
        measure_host(STUDY, connect() if options.ranks else None, options.only)
    elif options.slow:
        measure_slow(STUDY)
    elif not options.write:
        done = run(STUDY, options.only, options.minutes, options.processes, options.part or "0/1")
    if not options.ranks and not options.part:
        write(STUDY, PROSE, DOCUMENT)
        print(f"wrote {DOCUMENT}")
    return int(not done)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HpctrainError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(error.status)
