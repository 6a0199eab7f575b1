"""Jobs with very many phases: they run, with traces, and views stay small and readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.analysis import Analysis
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.job import Job
from hpctrain.trace import open_run
from hpctrain.views import compare
from hpctrain.views.report import tables, write_report
from tests import old_runs
from tests.helpers import jitter
from tests.marks import slow
from tests.traces import HandMade, train_traced

PHASES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1,000 phases, alternating all-reduce with three workers and a parameter server with two."""
    folder = tmp_path_factory.mktemp("phases")
    with HandMade(folder, 3) as run:
        for phase in range(PHASES):
            begin, served, cursor = 12.0 * phase, phase % 2 == 1, 64 * phase + 64
            strategy = "parameter_server" if served else "all_reduce"
            length = 5.0 + phase % 7 / 2
            for rank in range(3):
                trace = run[rank]
                serves = served and rank == 2
                trace.phase(begin, phase, "server" if serves else "worker", strategy)
                if not serves:
                    trace.span("data", begin + 0.1, begin + 0.5, step=phase)
                    trace.span("forward", begin + 0.5, begin + 2.0, step=phase)
                    trace.span("backward", begin + 2.0, begin + length - rank, step=phase)
                    trace.span("reduce", begin + length - rank, begin + 9.0, step=phase, bytes=4096, id=phase)
                    samples = 32 if served else 24
                    trace.done(begin + 9.0, phase, 2.0 / (1 + phase / 100), samples, phase=phase, cursor=cursor)
                if phase + 1 < PHASES:
                    trace.event(begin + 9.5, "switch", f"after {cursor} >= {cursor} samples")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [260, slow(PHASES)])
def test_run_of_many_phases_is_recorded_and_reported(tmp_path: Path, count: int) -> None:
    """One step each (the last takes the rest), alternating strategies and roles; 260 are more than fit a byte."""
    strategies = [{"name": "all_reduce"}, {"name": "parameter_server", "mode": "sync"}]
    phases = [{"strategy": strategies[i % 2], "until": {"rule": "after", "steps": 1}} for i in range(count)]
    del phases[-1]["until"]
    train = {"steps": count, "batch_size": 4, "evaluate_every": {"steps": 10**6}}
    job = Job(**{**old_runs.COMMON, "output": str(tmp_path / "runs"), "phases": phases, "train": train})
    run = train_traced(tmp_path, job, 2, network=LinkNetwork(), compute=jitter())
    assert run.steps(0)["phase"].unique().tolist() == list(range(count))
    assert run.notes == []
    assert [event.phase for event in run.events(1)["event"] if hasattr(event, "phase")] == list(range(count))
    if count == PHASES:
        text = write_report(run.folder)[0].read_text()
        assert "The 40 longest of 1,000 phases." in text and "could not be" not in text


def test_report_of_1000_phases_has_a_normal_size(folder: Path) -> None:
    page, _ = write_report(folder)
    text = page.read_text()
    assert page.stat().st_size < 4_800_000
    assert "could not be" not in text
    assert text.count("<tr") < 300
    assert "The 40 longest of 1,000 phases." in text and "and 992 more phases" in text


def test_facts_and_tables_note_what_they_leave_out(folder: Path) -> None:
    analysis = Analysis(open_run(folder))
    facts = [value for name, value in tables.facts(analysis.run, analysis.phases) if name == "strategy"]
    assert facts[0] == "phase 0: all_reduce, 3 workers" and facts[-1] == "and 992 more phases" and len(facts) == 9
    efficiency = tables.efficiency(analysis.efficiency)
    assert efficiency is not None and len(efficiency.rows) == 40
    assert [int(row[0]) for row in efficiency.rows] == sorted(int(row[0]) for row in efficiency.rows)
    assert efficiency.note == "The 40 longest of 1,000 phases."


def test_compare_shows_1000_phases_in_a_short_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([folder]) == 0
    assert "3, 2, 3, 2, ..." in capsys.readouterr().out
