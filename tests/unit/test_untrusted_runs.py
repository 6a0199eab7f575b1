"""Run folders from others: reading one executes nothing that it names and obeys nothing written in it."""

from __future__ import annotations

import sys
import types

import pytest

from hpctrain.cli import main
from hpctrain.errors import JobError
from hpctrain.job import Job, registry
from tests.marks import slow
from tests.traces import HandMade

PHASES = """
model = {name = "evil:Model", width = 3}
loss = "evil:loss"
metric = {name = "evil:metric", goal = "min"}
data = {name = "evil:Data", augment = ["evil:shift"]}
optimizer = {name = "evil:Optimizer", lr = 0.1, schedule = "evil:course", groups = "evil:groups"}
[[phases]]
strategy = {name = "evil:Strategy", every = 8, deep = {list = [1, 2]}}
until = {rule = "evil:Rule", limit = 0.5}
[[phases]]
strategy = "all_reduce"
"""
SWITCH = """
model = "<Net in train.py:7>"
[strategy]
name = "switch"
first = {name = "evil:Strategy", every = 8}
until = {rule = "evil:rule"}
then = "evil:Other"
"""
REPORT = ("report", "RUN")  # takes seconds
READING = (
    ("compare", "RUN", "RUN", "--csv", "table.csv", "-o", "pictures"),
    ("watch", "--once", "RUN"),
    ("trace", "RUN"),
    ("trace", "export", "RUN"),
    ("trace", "export", "--format", "csv", "RUN"),
    ("job", "show", "RUN/job.toml"),
    ("job", "show", "RUN/job.toml", "train.epochs=3"),
)


def make_run(folder, job=PHASES, strategy="evil:Strategy", text="loss 0.1 <= 0.2", **attributes):
    folder.mkdir()
    with HandMade(folder, 2, job=job) as run:
        for rank in (0, 1):
            for name, value in attributes.items():
                run[rank].writer._file.attrs[name] = value
            run[rank].phase(0.0, 0, "worker", strategy)
            for step in range(3):
                run[rank].span("forward", 100.0 * step, 100.0 * step + 40, step)
                run[rank].span("send", 100.0 * step + 40, 100.0 * step + 90, step, 64, 1 - rank, step)
                run[rank].done(100.0 * step + 90, step, epoch=(step + 1) / 10, cursor=64 * (step + 1))
            run[rank].event(300.0, "rule", text)
    return folder


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The file that appears if anything imports `evil`, a module in the current folder."""
    sprung, code = tmp_path / "sprung", tmp_path / "evil.py"
    code.write_text(f"open({str(sprung)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield sprung
    sys.modules.pop("evil", None)


@pytest.mark.parametrize(
    ("job", "commands"), [(PHASES, (REPORT, *READING)), slow(SWITCH, READING)], ids=["phases", "switch"]
)
def test_reading_a_run_executes_nothing_its_job_names(trap, tmp_path, capsys, job, commands):
    run = make_run(tmp_path / "run", job)
    (run / "evil.py").write_text((tmp_path / "evil.py").read_text())
    for command in commands:
        assert main([word.replace("RUN", "run") for word in command]) == 0, (command, capsys.readouterr().err)
        assert not trap.exists() and "evil" not in sys.modules, command
    with pytest.raises(JobError):
        Job.load(run / "job.toml")
    assert trap.exists()  # the trap works


def test_recorded_job_keeps_custom_names_without_importing_them(trap, tmp_path):
    (tmp_path / "job.toml").write_text(PHASES)
    job = Job.recorded(tmp_path / "job.toml")
    first, second = job.schedule
    assert first.strategy.plain() == {"name": "evil:Strategy", "every": 8, "deep": {"list": [1, 2]}}
    assert first.until is not None and first.until.plain() == {"rule": "evil:Rule", "limit": 0.5}
    assert job.unchecked == ["phases.0.strategy.name", "phases.0.until.rule"]
    assert second.strategy.options.exchange == "auto"  # built in: validated, and its defaults filled in
    again = job.override(["phases.0.strategy.every=9", "train.epochs=2"])
    assert again.schedule[0].strategy.plain()["every"] == 9
    (tmp_path / "again.toml").write_text(again.dump())
    assert Job.recorded(tmp_path / "again.toml") == again
    for spec in (job.model, job.optimizer.schedule, first.strategy, first.until, again.schedule[0].strategy):
        with pytest.raises(JobError, match="is not imported where a job is only read"):
            spec.resolve()
    with pytest.raises(JobError, match="is not imported where a job is only read"):
        job.loss.bind(2)
    assert not trap.exists()


def test_recorded_job_of_built_ins_equals_the_job(tmp_path):
    (tmp_path / "job.toml").write_text('model = "mlp"\nstrategy = {name = "switch", then = "all_reduce"}\n')
    recorded = Job.recorded(tmp_path / "job.toml")
    assert recorded == Job.load(tmp_path / "job.toml") and recorded.unchecked == []
    (tmp_path / "job.toml").write_text('[strategy]\nname = "all_reduce"\nalgorthm = "ring"\n')
    with pytest.raises(JobError, match=r"strategy.algorthm: unknown key \(did you mean algorithm\?\)"):
        Job.recorded(tmp_path / "job.toml")


def test_job_show_reports_what_it_did_not_check(trap, tmp_path, capsys):
    (tmp_path / "job.toml").write_text(PHASES)
    assert main(["job", "show", "job.toml"]) == 0
    shown = capsys.readouterr()
    (tmp_path / "shown.toml").write_text(shown.out)
    assert Job.recorded("shown.toml") == Job.recorded("job.toml")
    assert shown.err.splitlines() == [
        f"note: {key} is not built in and was not imported, so its options are not checked"
        for key in ("phases.0.strategy.name", "phases.0.until.rule")
    ]


def test_built_ins_are_not_imported_from_the_current_folder(tmp_path, monkeypatch):
    """A file there may have the name of a module that one of ours imports lazily."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    seen = []

    def imported(name):
        seen.append(sys.path[0])
        return types.ModuleType(name)

    monkeypatch.setattr("importlib.import_module", imported)
    for name in ("target", "mine:Rule"):
        with pytest.raises(JobError, match="has no"):
            registry.resolve("rule", name)
    assert seen[0] != str(tmp_path) and seen[1] == str(tmp_path)


def test_watch_knows_the_time_left_with_a_custom_strategy(tmp_path):
    from hpctrain.views.watch.watcher import Watcher

    run = make_run(tmp_path / "run", PHASES.replace("[[phases]]", "train = {steps = 10}\n[[phases]]", 1))
    shot = Watcher(run).look()
    assert shot.total == 640 and shot.notes == ()  # 10 rounds of 2 workers and 32 samples


ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def test_run_contents_cannot_control_the_terminal(tmp_path, monkeypatch, capsys):
    job = f'name = "x"\nmetric = "<{ESCAPE} in train.py:1>"\n'.encode("unicode_escape").decode().replace("\\n", "\n")
    job = job.replace("\\x", "\\u00")
    run = make_run(tmp_path / f"run{ESCAPE}", job, f"{ESCAPE}strategy", ESCAPE, host=ESCAPE, role=ESCAPE + "worker")
    (run / "metrics.csv").write_text(f"step,samples,epoch,seconds,split,loss,metric\n1,64,0.1,1,{ESCAPE},1.0,0.5\n")
    monkeypatch.chdir(tmp_path)
    for command in (*READING, ("trace", "RUN/nowhere")):
        status = main([word.replace("RUN", run.name) for word in command])
        output = capsys.readouterr()
        assert status == (2 if command[-1] == "RUN/nowhere" else 0), output.err
        assert "\x1b" not in output.out + output.err and "\x07" not in output.out + output.err, command
    assert "\x1b" not in (run / "csv" / "events.csv").read_text()


@pytest.mark.slow
def test_run_contents_cannot_become_markup_in_the_page(tmp_path):
    script = "<script>alert(1)</script>"
    job = f"name = 'x'\nloss = '<{script}>'\n"
    run = make_run(tmp_path / "<img src=x>$(touch x)", job, script, script, host=script, role=script)
    (run / "metrics.csv").write_text(f"step,samples,epoch,seconds,split,loss,metric\n1,64,0.1,1,{script},1.0,0.5\n")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page and "<img src=x>" not in page
    assert "hpctrain report &#39;/" in page  # the command can be copied safely
    assert "could not be" not in page, [line for line in page.splitlines() if "could not be" in line]
