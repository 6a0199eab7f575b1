"""The lock on a run folder: its holder, dead holders, and that only one of many contenders takes it over."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import CheckpointError, HpctrainError, RunInUseError
from hpctrain.filenames import LOCK
from hpctrain.run import lock as runlock
from hpctrain.run.identity import slurm_job
from hpctrain.run.lock import STALE, Holder, Lock

SLURM = {"SLURM_JOB_ID": "123"}


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """Tests leave no thread, and no file but the lock."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "run-lock"] == []
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK, "gone"}


def leave(folder: Path, age: float = 0.0, **changes: Any) -> Path:
    """A lock held by this process, except for `changes`; last renewed this many seconds ago."""
    path = folder / LOCK
    path.write_text(json.dumps(asdict(replace(Holder.here({}), **changes))))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def dead(folder: Path) -> Path:
    return leave(folder, started=1)  # its PID now belongs to another process


def taken(folder: Path, environment: dict[str, str] | None = None) -> bool:
    try:
        Lock(folder, environment or {}).release()
        return True
    except RunInUseError:
        return False


def test_one_holder_at_a_time_and_the_error_names_it(tmp_path: Path):
    lock = Lock(tmp_path, {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "13"})
    with pytest.raises(RunInUseError) as caught:
        Lock(tmp_path, {})
    assert f"{tmp_path} is in use by process {os.getpid()} on {os.uname().nodename}, Slurm job 9_4, since 2" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    lock.check()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert taken(tmp_path)


@pytest.mark.parametrize(
    ("changes", "age", "environment", "free"),
    [
        ({}, 0, {}, False),
        ({}, 10 * STALE, {}, False),  # it stalls, but lives
        ({"started": 1}, 0, {}, True),
        ({"pid": 2**22 - 1}, 0, {}, True),
        ({"machine": "another boot"}, STALE - 10, {}, False),
        ({"machine": "another boot"}, STALE + 10, {}, True),
        ({"machine": ""}, STALE - 10, {}, False),  # if nothing is known, the last renewal counts
        ({"machine": ""}, STALE + 10, {}, True),
        ({"machine": "x", "slurm_job": "123"}, 0, {**SLURM, "SLURM_RESTART_COUNT": "1"}, True),
        ({"machine": "x", "slurm_job": "123", "restarts": 1}, 0, {**SLURM, "SLURM_RESTART_COUNT": "1"}, False),
        ({"machine": "x", "slurm_job": "124"}, 0, {**SLURM, "SLURM_RESTART_COUNT": "1"}, False),
        ({"machine": "x"}, 0, {"SLURM_RESTART_COUNT": "1"}, False),
    ],
)
def test_dead_holder_is_recognised(
    tmp_path: Path, changes: dict[str, Any], age: float, environment: dict[str, str], free: bool
):
    leave(tmp_path, age, **changes)
    assert taken(tmp_path, environment) is free
    assert (tmp_path / LOCK).exists() is not free


@pytest.mark.parametrize("changes", [None, {"token": "../x"}, {"pid": -1}, {"pid": "1"}, {"more": 1}])
def test_unreadable_lock_is_judged_by_its_age(tmp_path: Path, changes: dict[str, Any] | None):
    path = tmp_path / LOCK
    tables = {**asdict(Holder.here({})), **(changes or {})}
    path.write_text(json.dumps(tables) if changes else '{"token"')
    assert not taken(tmp_path)
    os.utime(path, (0, 0))
    assert taken(tmp_path)


def test_ages_use_the_file_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This machine's own clock is two hours fast."""
    leave(tmp_path, machine="another")
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + 7200)
    assert not taken(tmp_path)


def test_interrupted_takeover_is_taken_over(tmp_path: Path):
    token = json.loads(dead(tmp_path).read_text())["token"]
    (tmp_path / f".{LOCK}-{token}").write_text(json.dumps(asdict(replace(Holder.here({}), started=1))))
    assert taken(tmp_path)


def test_ongoing_takeover_is_left_alone(tmp_path: Path):
    token = json.loads(dead(tmp_path).read_text())["token"]
    other = tmp_path / f".{LOCK}-{token}"
    other.write_text(json.dumps(asdict(Holder.here({}))))
    assert not taken(tmp_path)
    other.unlink()


def _late(inner: Callable[..., Any], rng: random.Random) -> Callable[..., Any]:
    def later(*arguments: Any) -> Any:
        time.sleep(rng.random() * 2e-3)
        return inner(*arguments)

    return later


def _contend(folder: Path, rounds: int, barrier: Barrier, won: Queue[tuple[int, str]]) -> None:
    """Try to get the lock in every round; random pauses vary the interleaving."""
    rng = random.Random(os.getpid())
    for name in ("_read", "_link", "_put"):
        setattr(runlock, name, _late(getattr(runlock, name), rng))
    for index in range(rounds):
        barrier.wait(60)
        lock = None
        try:
            lock = Lock(folder, {})
            won.put((index, lock.holder.token))
        except HpctrainError:
            pass
        barrier.wait(60)  # the winner holds it until all have tried,
        barrier.wait(60)  # and until the test has checked
        if lock is not None:
            lock.release()
        barrier.wait(60)


@pytest.mark.timeout(120)
def test_one_of_many_contenders_gets_a_dead_lock(tmp_path: Path):
    context, count, rounds = multiprocessing.get_context("fork"), 5, 25
    barrier, won = context.Barrier(count + 1), context.Queue()
    ranks = [context.Process(target=_contend, args=(tmp_path, rounds, barrier, won)) for _ in range(count)]
    for process in ranks:
        process.start()
    winners: list[list[str]] = [[] for _ in range(rounds)]
    try:
        for index in range(rounds):
            dead(tmp_path)
            barrier.wait(60)
            barrier.wait(60)
            kept = json.loads((tmp_path / LOCK).read_text())["token"]
            barrier.wait(60)
            barrier.wait(60)
            while not winners[index] or not won.empty():
                of, token = won.get(timeout=60)
                winners[of].append(token)
            assert winners[index] == [kept]
            assert not (tmp_path / LOCK).exists()
    finally:
        barrier.abort()
        for process in ranks:
            process.join(10)
            process.kill()
    assert [len(tokens) for tokens in winners] == [1] * rounds


def test_stalled_holder_notices_that_it_lost_the_folder(tmp_path: Path):
    lock = Lock(tmp_path, {})
    leave(tmp_path, token="t", pid=4711, host="n7")
    with pytest.raises(RunInUseError, match="has been taken over by process 4711 on n7"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()  # not its own lock
    (tmp_path / LOCK).unlink()
    lock.check()  # a removed folder is reported elsewhere


def test_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runlock, "BEAT", 0.01)
    lock = Lock(tmp_path, {})
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 30
    while lock.path.stat().st_mtime < time.time() - 60:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.undo()
    lock.release()


def test_lock_is_released_at_process_end_but_not_by_forked_children(tmp_path: Path):
    program = """
import os, pathlib, sys
from hpctrain.filenames import LOCK
from hpctrain.run.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1]), {})
if os.fork() == 0:
    lock.release()
    sys.exit()
os.wait()
assert lock.path.exists()
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, check=False)
    assert ended.returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lock = Lock(tmp_path, {})
    assert not taken(tmp_path)
    lock.release()
    dead(tmp_path)
    assert taken(tmp_path)


def test_unwritable_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"run.lock cannot be written"):
        Lock(tmp_path / "gone", {})


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "123"}, "123"),
        ({"SLURM_JOB_ID": "125", "SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "0"}, "123_0"),
        ({"SLURM_JOB_ID": "123", "SLURM_CLUSTER_NAME": "alps"}, "123@alps"),
        ({"SLURM_JOB_ID": str(2**26 + 5), "SLURM_CLUSTER_NAME": "alps"}, str(2**26 + 5)),  # federated: may move
        ({"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": "2"}, "123"),
    ],
)
def test_slurm_job_numbers(environment: dict[str, str], job: str):
    assert slurm_job(environment) == job
