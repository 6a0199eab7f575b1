"""Stop signals without a launcher: they set a flag instead of killing the process."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpctrain.launcher.facts import STOPPING
from hpctrain.launcher.signals import GRACE, LIMIT, SAVING, SIGNALS, Patience, StopSignals, prte_parent
from tests.conftest import ROOT


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_signal_sets_a_flag_and_the_first_counts(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert stop.asked == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), number)  # launchers send a signal twice within a moment
        assert stop.asked == number


def test_flag_is_set_while_the_main_thread_is_in_c_code() -> None:
    with StopSignals() as stop:
        seen: list[int] = []

        def send_and_look() -> None:
            time.sleep(0.1)  # until the main thread computes
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # Python's own handler has to wait for the main thread
            seen.append(stop.asked)

        thread = threading.Thread(target=send_and_look)
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # about a second that no signal interrupts
        assert seen, "the computation was too short to show anything"
        thread.join()
    assert seen == [signal.SIGTERM]


def test_former_handlers_are_restored() -> None:
    former = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != former
    assert [signal.getsignal(number) for number in SIGNALS] == former
    assert signal.set_wakeup_fd(-1) == -1


def test_without_open_mpi_there_is_no_launcher_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")  # left over: our parent is not prterun
    assert prte_parent() is None
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.held
        stop.say("stopped")
    assert capsys.readouterr().err == "stopped\n"


# -- how long is waited, and what ends a rank ------------------------------------------------------------------------
class TestPatience:
    def test_patience_does_not_expire_before_a_signal(self) -> None:
        patience = Patience()
        patience.stepped(0.0)
        assert patience.hopeful(1e6)
        assert not patience.over(1e6)

    def test_patience_before_the_first_step_and_with_short_steps(self) -> None:
        patience = Patience(asked=100.0)
        assert patience.hopeful(100 + GRACE)
        assert not patience.hopeful(100.1 + GRACE)
        assert not patience.over(100 + LIMIT)
        assert patience.over(100.1 + LIMIT)
        patience.stepped(120.0)
        patience.stepped(120.5)
        assert patience.hopeful(122.0)  # twice the longest step, and a second
        assert not patience.hopeful(122.6)  # the launcher need not wait longer
        assert not patience.over(120 + LIMIT)
        assert patience.over(121 + LIMIT)

    def test_long_steps_are_waited_for(self) -> None:
        patience = Patience()
        patience.stepped(0.0)
        patience.stepped(40.0)
        patience.asked = 50.0
        assert patience.hopeful(120.0)
        assert not patience.over(130.0)
        assert patience.over(132.0)

    def test_checkpoint_may_take_any_time_until_the_next_step(self) -> None:
        patience = Patience(asked=100.0)
        patience.saving(105.0)
        assert patience.hopeful(105 + SAVING)
        assert not patience.over(105 + SAVING)
        assert patience.over(106 + SAVING)
        patience.stepped(200.0)
        assert patience.over(201 + LIMIT)

    def test_stop_seconds_of_the_job_apply(self) -> None:
        patience = Patience(seconds=90.0, asked=100.0)
        patience.stepped(110.0)
        assert patience.hopeful(200.0)
        assert not patience.over(200.0)
        assert patience.over(201.0)


RANK = """
import hashlib, os, signal, sys, time
from hpctrain.launcher.signals import StopSignals
what = sys.argv[1]
limit = 60.0 if what == "twice" else 0.5
with StopSignals(3, limit=limit, before_end=lambda: os.write(2, b"flushed.")) as stop:
    print("up", flush=True)
    if what == "steps":
        while not stop.asked:
            time.sleep(0.01)
        for _ in range(20):
            time.sleep(0.1)
            stop.stepped()
        print("stepped", flush=True)
    else:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # half an hour in C code
"""


def test_when_a_stop_signal_ends_a_rank(tmp_path: Path) -> None:
    """A stuck rank, some time after the signal; any rank, at a second signal; never a rank that continues its steps."""

    def start(what: str) -> subprocess.Popen[str]:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), STOPPING: str(tmp_path / what)}
        argv = [sys.executable, "-c", RANK, what]
        process = subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    ranks = {what: start(what) for what in ("stuck", "steps", "twice")}
    try:
        for rank in ranks.values():
            rank.send_signal(signal.SIGUSR1)
            rank.send_signal(signal.SIGTERM)
        messages = {what: ranks[what].communicate(timeout=30)[1] for what in ("stuck", "steps")}
        assert ranks["stuck"].returncode in (-signal.SIGTERM, -signal.SIGUSR1)
        assert messages["stuck"].startswith("hpctrain: rank 3 exits: SIG")
        assert "no step has ended" in messages["stuck"]
        assert messages["stuck"].endswith("flushed.")
        assert (ranks["steps"].returncode, messages["steps"]) == (0, "")
        assert (tmp_path / "steps").exists(), "the launcher was not asked to wait"
        assert ranks["twice"].poll() is None
        ranks["twice"].send_signal(signal.SIGUSR1)  # an announcement, sent again
        time.sleep(0.3)
        assert ranks["twice"].poll() is None
        ranks["twice"].send_signal(signal.SIGHUP)
        err = ranks["twice"].communicate(timeout=10)[1]
        assert ranks["twice"].returncode == -signal.SIGHUP
        assert "rank 3 exits: a second stop signal was received" in err
    finally:
        for rank in ranks.values():
            rank.kill()
            rank.wait()


def test_ignored_sighup_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.asked == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
