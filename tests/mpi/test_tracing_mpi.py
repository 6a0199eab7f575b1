"""Contents of the traces of real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.run.tracing import Tracing
from hpctrain.trace import Kind
from hpctrain.trace.device import TIMED, DeviceTimes
from tests import helpers
from tests.helpers_mpi import Join


def test_every_message_is_traced_at_both_ends(join: Join) -> None:
    comm = join(traced=True)
    if comm.size == 1:
        pytest.skip("one rank has nobody to send to")
    helpers.messages_are_traced(comm)


def test_every_barrier_is_traced_on_all_ranks(join: Join) -> None:
    helpers.barriers_are_traced(join(traced=True))


class Passed:
    """An event of a device that has always finished."""

    def record(self) -> None:
        return None

    def query(self) -> bool:
        return True

    synchronize = record

    def elapsed_time(self, end_event: object) -> float:
        return 0.0


def test_every_step_is_timed_on_the_device_and_complete_when_its_phase_ends(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = join(traced=True)
    times, settled = DeviceTimes(comm.recorder, Passed), []
    comm.recorder.drain()

    def settle(tracing: Tracing) -> None:
        times.settle()
        settled.append(len(comm.recorder.drain()["device"]))

    monkeypatch.setattr(Tracing, "settle", settle)
    until = {"rule": "after", "steps": 3}
    phases = [
        {"strategy": {"name": "all_reduce"}, "until": until},
        {"strategy": {"name": "local_sgd", "every": 2}},
    ]
    helpers.quiet_train(comm, helpers.make_job(tmp_path, phases=phases, train={"steps": 5, "batch_size": 2}))
    assert settled == [3 * len(TIMED), 2 * len(TIMED)]
    with comm.span("update"), comm.span("reduce"):
        pass
    times.read()
    assert comm.recorder.drain()["device"]["kind"].tolist() == [Kind.UPDATE]
