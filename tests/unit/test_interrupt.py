"""Stop signals without a launcher: a flag instead of death."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from hpctrain.interrupt import SIGNALS, StopSignals, prte_parent


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_becomes_a_flag_and_the_first_one_counts(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert stop.asked == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == number


def test_the_flag_is_set_while_the_main_thread_is_in_c_code() -> None:
    with StopSignals() as stop:
        seen: list[int] = []

        def send_and_look() -> None:
            time.sleep(0.1)  # until the main thread computes
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # Python's own handler has to wait for the main thread
            seen.append(stop.asked)

        thread = threading.Thread(target=send_and_look)
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second or so that no signal cuts short
        assert seen, "the computation was too short to show anything"
        thread.join()
    assert seen == [signal.SIGTERM]


def test_the_former_handlers_come_back() -> None:
    former = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != former
    assert [signal.getsignal(number) for number in SIGNALS] == former
    assert signal.set_wakeup_fd(-1) == -1


def test_without_open_mpi_there_is_no_launcher_to_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")  # left over from elsewhere: our parent is no prterun
    assert prte_parent() is None
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.held
        stop.say("stopped")
    assert capsys.readouterr().err == "stopped\n"
