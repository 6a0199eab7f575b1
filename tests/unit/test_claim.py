"""Which run is resumed and which is refused, with fake environments and folders without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from hpctrain.cli import main
from hpctrain.errors import CheckpointError, JobError, RunInUseError
from hpctrain.filenames import HISTORY, JOB, LOCK, MODEL, RUN
from hpctrain.job import Job
from hpctrain.job.explain import explain
from hpctrain.run.claim import Claim, new_run, run_to_resume
from hpctrain.run.identity import Identity
from hpctrain.run.resume import FIXED, FREE, Change, Resume, binding, differences
from tests.unit.test_run_lock import leave

LATEST = Resume("latest")
FILE = """
name = "digits"
[optimizer]
name = "Adam"
lr = 0.05
[train]
batch_size = 8
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with digits.toml and digits-adam.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.toml").write_text(FILE)
    (tmp_path / "digits-adam.toml").write_text(FILE.replace('"digits"', '"digits-adam"'))
    yield tmp_path
    assert not list((tmp_path / "runs").glob(f"*/{LOCK}"))


def job(*overrides: str, file: str = "digits.toml") -> Job:
    return Job.load(file, overrides)


def slurm(number: int, task: int | None = None, restarts: int = 0) -> dict[str, str]:
    array = {} if task is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    own = str(number + (task or 0))
    return {"SLURM_JOB_ID": own, **array, **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})}


def interrupted(made: Job, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of a run that was started with these arguments and stopped after a checkpoint."""
    claim = new_run(made, environment)
    (claim.folder / "checkpoints").mkdir()
    (claim.folder / "checkpoints" / "000000000008.safetensors").touch()
    claim.release()
    return claim.folder


def resumed(made: Job, environment: Mapping[str, str] = os.environ, resume: Resume = LATEST) -> Path | str:
    """The run that is resumed, or the message about the new one."""
    found = run_to_resume(made, resume, environment)
    if isinstance(found, Claim):
        found.release()
        return found.folder
    return found


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


# -- which run it is ---------------------------------------------------------------------------------------------
def test_runs_with_similar_names_are_distinct(folder: Path):
    """Also if a run folder was renamed."""
    adam = interrupted(job(file="digits-adam.toml"))
    assert resumed(job()) == ""
    mine = interrupted(job())
    os.utime(adam / RUN)
    assert resumed(job()) == mine
    moved = mine.rename(mine.with_name("the-good-one"))
    assert resumed(job()) == moved
    assert resumed(job(file="digits-adam.toml")) == adam


def test_outside_slurm_the_resolved_job_identifies_a_run(folder: Path):
    first, other = interrupted(job()), interrupted(job("optimizer.lr=0.3", "seed=4"))
    assert resumed(job()) == first
    assert resumed(job("seed=4", "optimizer.lr=0.3")) == other  # in whatever order
    assert resumed(job("seed=4")) == ""
    assert resumed(job("trace.report=true", "train.checkpoint_every.epochs=1", "data.threads=0")) == first
    again = interrupted(job())
    assert resumed(job()) == again  # the newest
    (again / MODEL).touch()
    assert resumed(job()) == first
    (first / JOB).unlink()
    assert resumed(job()) == ""


def test_slurm_job_has_its_own_runs(folder: Path):
    outside, mine, theirs = interrupted(job()), interrupted(job(), slurm(20)), interrupted(job(), slurm(21))
    assert resumed(job(), slurm(20, restarts=1)) == mine
    assert resumed(job(), slurm(21, restarts=1)) == theirs
    assert resumed(job()) == outside
    notes = resumed(job(), slurm(22))
    assert f"this is a new run; {theirs}, an unfinished run of an equal job, was started in Slurm job 21" in str(notes)
    assert f"hpctrain train --resume {theirs}" in str(notes)


def test_requeued_array_tasks_keep_their_own_runs(folder: Path):
    runs = [interrupted(job(), slurm(20, task)) for task in range(3)]
    assert [resumed(job(), slurm(20, task, restarts=1)) for task in (2, 0, 1)] == [runs[2], runs[0], runs[1]]


def test_job_file_edited_before_the_requeue_is_refused_by_key(folder: Path):
    mine = interrupted(job("seed=4"), slurm(20))
    (folder / "digits.toml").write_text(FILE.replace("0.05", "0.3").replace("8", "16") + 'nan = "skip"\n')
    with pytest.raises(CheckpointError) as caught:
        resumed(job("seed=4"), slurm(20, restarts=1))
    assert (
        f"{mine} is a run of another job: optimizer.lr is 0.05 there and 0.3 in this job, train.batch_size is 8 there "
        'and 16 in this job, train.nan is "stop" there and "skip" in this job; start a new run' in str(caught.value)
    )
    assert "\n" not in str(caught.value)


def test_several_jobs_in_one_allocation_are_several_runs(folder: Path):
    """Other overrides or another file mean another run; each job resumes its own."""
    one, two = interrupted(job("seed=1"), slurm(20)), interrupted(job("seed=2"), slurm(20))
    other = interrupted(job("seed=1", file="digits-adam.toml"), slurm(20))
    assert resumed(job("seed=3"), slurm(20)) == ""
    assert resumed(job("seed=1"), slurm(20)) == one
    assert resumed(job("seed=2"), slurm(20)) == two
    assert resumed(job("seed=1", file="digits-adam.toml"), slurm(20)) == other
    (folder / "digits-b.toml").write_text(FILE.replace("0.05", "0.3"))
    assert resumed(job("seed=1", file="digits-b.toml"), slurm(20)) == ""


def test_run_in_use_is_not_resumed(folder: Path):
    """No second run starts beside it, with or without a checkpoint; a dead run's lock blocks none."""
    for checkpoint in (False, True):
        claim = new_run(job(), slurm(20))
        claim.release()
        mine = interrupted(job(), slurm(20)) if checkpoint else claim.folder
        leave(mine, machine="n7", host="n7", pid=4711, slurm_job="20")
        for resume in (LATEST, Resume(mine)):
            if checkpoint or resume is LATEST:
                with pytest.raises(RunInUseError, match=f"{mine} is in use by process 4711 on n7, Slurm job 20, since"):
                    resumed(job(), slurm(20), resume)
        assert resumed(job(), slurm(20, restarts=1)) == (mine if checkpoint else "")


def test_run_without_a_recorded_identity(folder: Path):
    mine = interrupted(job("seed=4"))
    (mine / RUN).unlink()
    assert resumed(job("seed=4")) == mine
    assert "was started outside of Slurm" in str(resumed(job("seed=4"), slurm(20)))


def test_two_runs_started_at_once_get_their_own_folders(folder: Path):
    claims = [new_run(job()) for _ in range(5)]
    assert len({claim.folder for claim in claims}) == 5
    for claim in claims:
        claim.release()


def test_failed_folder_creation_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Identity, "write", full)
    with pytest.raises(JobError, match=r"cannot be created \(No space left on device\)"):
        new_run(job())
    assert list((folder / "runs").iterdir()) == []


# -- what the job may change -------------------------------------------------------------------------------------
def test_overrides_are_recorded_in_the_run_folder(folder: Path):
    mine = interrupted(job("optimizer.lr=0.3", "seed=4"), slurm(20))
    assert (mine / JOB).read_text().splitlines()[0] == "# digits with optimizer.lr=0.3, seed=4"
    assert Identity.read(mine) == Identity("20", str(folder / "digits.toml"), ("optimizer.lr=0.3", "seed=4"))
    assert Job.load(mine / JOB) == job("optimizer.lr=0.3", "seed=4")
    assert not (interrupted(job()) / JOB).read_text().startswith("#")
    nasty = interrupted(job("data.path='''a\n[model]'''"))
    assert Job.load(nasty / JOB).data.options == {"path": "a\n[model]"}


def test_differing_job_is_refused_unless_changes_are_taken(folder: Path):
    mine = interrupted(job("seed=4"))
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    keys = ["optimizer.lr=0.3", "optimizer.betas=[0.5, 0.9]", "train.clip_norm=1", "trace.report=true"]
    other = job("seed=4", *keys)
    with pytest.raises(CheckpointError) as caught:
        resumed(other, resume=Resume(mine))
    words = "optimizer.lr is 0.05 there and 0.3 in this job, optimizer.betas is left out there and [0.5, 0.9] in this"
    assert f"{words} job, train.clip_norm is left out there and 1.0 in this job; start" in str(caught.value)
    assert "trace" not in str(caught.value)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before

    take = Resume(mine, changes="take", optimizer="reset")
    claim = run_to_resume(other, take)
    assert isinstance(claim, Claim)
    assert Change("trace.report", False, True) in claim.changes
    notes = claim.record(other, take, 96)
    claim.release()
    assert notes[0].startswith("changed from here on: optimizer.lr = 0.3 (was 0.05), trace.report = true (was false), ")
    assert notes[1] == "the optimizer starts afresh"
    assert Job.load(mine / JOB) == other
    assert (mine / JOB).read_text().startswith(f"# digits with seed=4\n# changed since, see {HISTORY}\n")
    rows = [json.loads(line) for line in (mine / HISTORY).read_text().splitlines()]
    assert [(row["sample"], row["key"], row.get("old"), row.get("new")) for row in rows][:3] == [
        (96, "optimizer.lr", 0.05, 0.3),
        (96, "trace.report", False, True),
        (96, "optimizer.betas", None, [0.5, 0.9]),
    ]
    assert rows[-1]["reset"] is True
    assert resumed(other) == mine


@pytest.mark.parametrize(
    "change", ["seed=5", "data.name=mnist", "data.validation=0.2", "data.shuffle=false", "metric.goal=min"]
)
def test_changes_of_fixed_keys_are_refused_by_name(folder: Path, change: str):
    mine = interrupted(job())
    with pytest.raises(CheckpointError, match=rf"^{change.split('=')[0]} = .* start a new run to change it") as caught:
        resumed(job(change), resume=Resume(mine, changes="take"))
    assert "\n" not in str(caught.value)


def test_error_counts_changes_when_there_are_many(folder: Path):
    """If a table has another name, only that is reported."""
    mine = interrupted(job())
    keys = ["threads=1", "seed=5", *(f"model.option{index}=1" for index in range(6))]
    with pytest.raises(CheckpointError, match="model.option3 is left out there and 1 in this job and 2 more; start"):
        resumed(job(*keys), resume=Resume(mine))
    other = '"all_reduce" there and "parameter_server" in this job; start'
    with pytest.raises(CheckpointError, match=f"another job: strategy.name is {other}"):
        resumed(job("strategy=parameter_server"), resume=Resume(mine))


def test_object_of_a_program_is_the_same_on_any_line(folder: Path):
    first = interrupted(Job(model=lambda: None, name="own"))
    second = Job(model=lambda: None, name="own")
    assert resumed(second, resume=Resume(first)) == first
    with pytest.raises(CheckpointError, match="model.name is "):
        resumed(Job(model=Path, name="own"), resume=Resume(first))


def test_entries_of_tables_and_lists_are_compared_one_by_one():
    base = Job(phases=[{"strategy": "all_reduce", "until": {"rule": "after", "steps": 9}}, {"strategy": "all_reduce"}])
    other = base.override(["phases.0.until.steps=10"])
    assert differences(base.plain(), other.plain()) == [Change("phases.0.until.steps", 9, 10)]
    assert differences({"a": {}, "b": [1]}, {"a": {}, "b": [1, 2], "c": True}) == [
        Change("b", [1], [1, 2]), Change("c", None, True)
    ]  # fmt: skip
    assert differences({"a": 1}, {"a": True}) != []
    assert differences({"a": 1}, {"a": 1.0}) == []
    assert binding([Change("trace.report", 0, 1), Change("trace_more", 0, 1)]) == [Change("trace_more", 0, 1)]


def test_every_fixed_and_free_key_exists():
    known = {row.key for row in explain()}
    for key in (*FREE, *FIXED):
        assert any(name == key or name.startswith(key + ".") for name in known), key


# -- the command line ----------------------------------------------------------------------------
def test_resume_option_on_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Overrides are changes with the run's own job, named or not, but not with another job."""
    seen: list[tuple[Job, Resume | None]] = []

    def train(load: Callable[[], tuple[Job, Resume | None]]) -> int:
        seen.append(load())
        return 0

    monkeypatch.setattr("hpctrain.run.command.main", train)
    run = interrupted(job("seed=4"))
    for words, resume in (
        (["digits.toml"], None),
        (["digits.toml", "--resume=latest"], LATEST),
        (["digits.toml", f"--resume={run}"], Resume(run)),
        ([f"--resume={run}"], Resume(run, "take")),
        (["--resume", str(run), "optimizer.lr=0.3"], Resume(run, "take")),
        ([f"{run}/job.toml", "optimizer.lr=0.3", "--resume"], Resume(run, "take")),
        ([str(folder / run / "job.toml"), f"--resume={run}", "--reset-optimizer"], Resume(run, "take", "reset")),
        (["--resume=latest", f"--resume={run}", "optimizer.lr=0.3"], Resume(run, "take")),  # as train.sbatch passes on
    ):
        assert main(["train", *words]) == 0
        assert seen[-1][1] == resume, words
        assert seen[-1][0].overrides == (("optimizer.lr=0.3",) if "optimizer.lr=0.3" in words else ()), words


@pytest.mark.parametrize("words", [["--reset-optimizer"], ["--reset-optimizer", "--resume=latest"]])
def test_reset_optimizer_needs_a_run(folder: Path, words: list[str], capfd: pytest.CaptureFixture[str]):
    assert main(["run", "digits.toml", *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("keys", [{"changes": "yes"}, {"optimizer": "no"}])
def test_values_of_resume_in_python(keys: dict[str, str]):
    with pytest.raises(JobError, match="must be"):
        Resume("runs/x", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [{"changes": "take"}, {"optimizer": "reset"}])
def test_latest_continues_a_run_unchanged(keys: dict[str, str]):
    with pytest.raises(JobError, match="name the run folder"):
        Resume("latest", **keys)  # type: ignore[arg-type]
