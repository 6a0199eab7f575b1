"""Memory that is touched when a run starts, so that a switch does not have to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.cluster import assign_roles
from hpctrain.comm.virtual.world import World
from hpctrain.launcher import MEMORY
from hpctrain.launcher.facts import MARK
from hpctrain.launcher.started import without_launcher
from hpctrain.run.prepare import prepare
from hpctrain.run.reserve import kept_up_to, models_needed
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PROGRAM = """
import resource
import numpy as np
from hpctrain.run.reserve import keep_freed_memory, reserve

def touched():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

import os
enough = keep_freed_memory(os.environ)
before = resident()
reserve(128 * 2**20, enough)
kept = resident() - before
before = touched()
parts = [np.ones(32 * 2**20, np.uint8) for _ in range(3)]
print(kept, touched() - before)
"""


def measure(tunables: str | None, launched: bool = False) -> tuple[int, int]:
    """(bytes that a process keeps after reserving 128 MiB, page faults when it then fills 96 MiB)."""
    environment = {**without_launcher(os.environ), "PYTHONPATH": str(ROOT)}
    for name in ("GLIBC_TUNABLES", MARK):
        environment.pop(name, None)
    if launched:
        environment["PMI_SIZE"] = "2"
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    kept, faults = map(int, done.stdout.split())
    return kept, faults


def test_reserved_memory_stays_and_is_reused():
    kept, faults = measure(MEMORY)
    assert kept > 120 * MIB
    assert faults < 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_is_kept_under_a_plain_mpirun():
    """Without GLIBC_TUNABLES."""
    kept, faults = measure(None, launched=True)
    assert kept > 120 * MIB
    assert faults < 20


def test_setting_of_the_user_is_kept():
    kept, _ = measure("glibc.malloc.mmap_max=65536", launched=True)
    assert kept < 8 * MIB


@pytest.mark.parametrize(
    "tunables", [None, "glibc.malloc.hugetlb=1", "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000"]
)
def test_nothing_is_reserved_if_the_allocator_would_not_keep_it(tunables: str | None):
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
def test_allocator_setting_is_read_from_its_variable(tunables: str, kept: int):
    assert kept_up_to(tunables) == kept


@pytest.mark.parametrize(
    ("ranks", "servers", "colocated", "needed"),
    [
        (4, 1, False, [5, 2, 2, 2 + 11]),
        (5, 2, False, [5, 2, 2, 2 + 5.5, 2 + 5.5]),
        (2, 1, True, [5, 2 + 9]),
        (3, 0, False, [0, 0, 0]),
    ],
)
def test_memory_needed_by_each_rank_for_a_phase(ranks: int, servers: int, colocated: bool, needed: list[float]):
    roles = assign_roles([0] * ranks, servers, colocated)
    assert [models_needed(roles, rank) for rank in range(ranks)] == needed


def test_run_reserves_for_the_most_demanding_later_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reserved: list[int] = []
    monkeypatch.setattr("hpctrain.run.begin.reserve", lambda nbytes, kept: reserved.append(nbytes))
    until = {"rule": "after", "steps": 1}
    served: list[helpers.Tables] = [helpers.served(servers=2), helpers.served(servers=1)]
    strategies = [served[0], {"name": "all_reduce"}, served[1], {"name": "all_reduce"}]
    phases: list[helpers.Tables] = [{"strategy": strategy, "until": until} for strategy in strategies]
    del phases[-1]["until"]
    job = helpers.make_job(tmp_path, phases=phases)
    prepared = World(4).run(lambda comm: prepare(job, comm))[0]
    World(4).run(lambda comm: helpers.quiet_train(comm, job))
    layout = prepared.replica.layout
    model = layout.length * layout.dtype.itemsize
    assert sorted(reserved) == [2 * model, 2 * model, 5 * model, 13 * model]
