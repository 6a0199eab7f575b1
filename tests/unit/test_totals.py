"""The totals of a run, and which of them a checkpoint keeps."""

from __future__ import annotations

import json

import pytest

from hpctrain.clock.decisions import Ask, EarlyStopping
from hpctrain.run.folder import PhaseSummary
from hpctrain.run.totals import Ending, Totals, TrainingClock

# As version 0.1 wrote it, before it knew "owed".
ACCOUNT = """{"books": {"cursor": 60, "step": 5, "phase": 1, "phase_start": 40, "summaries": [
  {"index": 0, "strategy": "all_reduce", "steps": 3, "samples": 40, "seconds": 1.5, "pauses": 0.5, "loss": 0.7,
   "dropped": 0},
  {"index": 1, "strategy": "parameter_server (async)", "steps": 4, "samples": 20, "seconds": 0.5, "pauses": 0.0,
   "loss": 0.6, "dropped": 2}]},
 "stopping": {"target": null, "patience": 3, "min_delta": 0.0, "higher_is_better": true, "best": 0.9, "waited": 1,
  "history": []},
 "ending": "phase", "why": "after 20 >= 20 samples"}"""


def test_totals_of_version_0_1_are_read_and_written_unchanged() -> None:
    account = json.loads(ACCOUNT)
    totals = Totals(EarlyStopping(None, None, 0.0))
    totals.take(account)
    assert (totals.cursor, totals.step, totals.phase, totals.phase_start) == (60, 5, 1, 40)
    assert totals.ending is Ending.PHASE
    assert totals.owed is Ask.NOTHING
    assert totals.seconds == 2.0
    assert totals.summaries[1] == PhaseSummary(1, "parameter_server (async)", 4, 20, 0.5, 0.0, 0.6, 2)
    assert totals.stopping.best == 0.9
    del account["stopping"]["history"]  # which nothing reads
    assert json.loads(json.dumps(totals.plain())) == {**account, "owed": 0}


@pytest.mark.parametrize(("ending", "stored"), [(Ending.NOTHING, "on"), (Ending.PHASE, "phase"), (Ending.RUN, "stop")])
def test_endings_are_stored_as_in_version_0_1(ending: Ending, stored: str) -> None:
    assert Totals(EarlyStopping(None, None, 0.0), ending=ending).plain()["ending"] == stored


def test_interrupted_and_left_are_not_stored() -> None:
    totals = Totals(EarlyStopping(None, None, 0.0), owed=Ask.EVALUATE | Ask.END_PHASE, interrupted=True, left=True)
    other = Totals(EarlyStopping(None, None, 0.0))
    other.take(totals.plain())
    assert other == Totals(EarlyStopping(None, None, 0.0), owed=Ask.EVALUATE | Ask.END_PHASE)


def test_training_clock_can_be_paused() -> None:
    now, summary = [0], PhaseSummary(0, "all_reduce", seconds=1.0)
    clock = TrainingClock(lambda: now[0], summary)
    now[0] = 5_000_000_000
    assert clock.seconds == 6.0
    with clock.stopped(held=1_000_000_000):
        now[0] = 8_000_000_000
    assert (summary.seconds, summary.pauses) == (5.0, 4.0)
    now[0] = 9_000_000_000
    assert clock.seconds == 6.0
