"""Memory that is touched when a run begins, so that a switch does not have to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.comm.virtual.world import World
from hpctrain.launcher import MEMORY
from hpctrain.run.prepare import prepare
from hpctrain.run.reserve import kept_up_to
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PROGRAM = """
import resource
import numpy as np
from hpctrain.run.reserve import reserve

def touched():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
reserve(128 * 2**20)
kept = resident() - before
before = touched()
parts = [np.ones(32 * 2**20, np.uint8) for _ in range(3)]
print(kept, touched() - before)
"""


def measure(tunables: str | None) -> tuple[int, int]:
    """(bytes that stay with a process that reserves 128 MiB, page faults of then filling 96 MiB)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    kept, faults = map(int, done.stdout.split())
    return kept, faults


def test_what_is_reserved_stays_and_is_there_later():
    kept, faults = measure(MEMORY)
    assert kept > 120 * MIB
    assert faults < 20


@pytest.mark.parametrize(
    "tunables", [None, "glibc.malloc.hugetlb=1", "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000"]
)
def test_nothing_is_touched_where_the_allocator_would_not_keep_it(tunables: str | None):
    kept, _ = measure(tunables)
    assert kept < 8 * MIB


@pytest.mark.parametrize(
    ("tunables", "kept"),
    [
        (MEMORY, 10**15),
        ("", 0),
        ("glibc.malloc.mmap_max=0", 0),
        ("glibc.malloc.mmap_max=1:glibc.malloc.trim_threshold=99", 0),
        ("glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0x100", 256),
        ("glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=much", 0),
    ],
)
def test_what_the_allocator_keeps_is_in_its_variable(tunables: str, kept: int):
    assert kept_up_to(tunables) == kept


def later(folder: Path, ranks: int, *strategies: helpers.Tables) -> list[list[float]]:
    """By phase and rank, what the phases after it will need, in times of the model's size."""
    schedule: list[helpers.Tables] = [
        {"strategy": strategy, "until": {"rule": "after", "samples": 20}} for strategy in strategies
    ]
    del schedule[-1]["until"]
    job = helpers.make_job(folder, phases=schedule)
    prepared = World(ranks).run(lambda comm: prepare(job, comm))[0]
    model = prepared.replica.layout.length * prepared.replica.layout.dtype.itemsize
    return [
        [prepared.later_bytes(phase, rank) / model for rank in range(ranks)] for phase in range(len(strategies))
    ]


ALL_REDUCE: helpers.Tables = {"name": "all_reduce"}


@pytest.mark.parametrize(
    ("ranks", "served", "needs"),
    [
        (4, helpers.served(servers=1), [5, 2, 2, 2 + 11]),
        (5, helpers.served(servers=2), [5, 2, 2, 2 + 5.5, 2 + 5.5]),
        (2, helpers.served(servers=1, colocated=True), [5, 2 + 9]),
    ],
)
def test_who_will_need_how_much(tmp_path: Path, ranks: int, served: helpers.Tables, needs: list[float]):
    assert later(tmp_path, ranks, ALL_REDUCE, served) == [needs, [0] * ranks]


def test_only_of_the_phases_that_are_still_to_come(tmp_path: Path):
    needs = later(tmp_path, 4, helpers.served(servers=1), ALL_REDUCE, helpers.served(servers=2), ALL_REDUCE)
    assert [row[1] for row in needs] == [2, 2, 0, 0]
    assert [row[3] for row in needs] == [2 + 4.5, 2 + 4.5, 0, 0]
