"""Run folders of version 0.1: report and compare read them, and their checkpoints are resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hpctrain.analysis import Analysis
from hpctrain.comm.virtual.world import World
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.trace import open_run
from hpctrain.views import compare
from hpctrain.views.report import write_report
from tests import old_runs
from tests.marks import mostly_slow

FOLDERS = Path(__file__).parents[1] / "fixtures" / "runs_0.1"
RANKS, EPOCHS = 3, 4


def copied(tmp_path: Path, name: str) -> Path:
    """The run's folder, to write into."""
    return Path(shutil.copytree(FOLDERS / name, tmp_path / name))


def analysed(name: str) -> Analysis:
    return Analysis(open_run(FOLDERS / name))


def finished(name: str, output: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """The final parameters of the job with this version."""
    job = old_runs.job(name, output=str(output), trace={"enabled": False})
    results = World(RANKS).run(lambda comm: train(job, comm, resume, Narrator(enabled=False)))
    return load_file(results[0].folder / "model.safetensors")


# -- traces --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "strategy", "workers", "updates"),
    [
        ("all_reduce", "all_reduce", 3, 16),
        ("parameter_server_sync", "parameter_server (sync)", 2, 24),
        ("parameter_server_async", "parameter_server (async)", 2, 44),
    ],
)
def test_phases_roles_and_updates_of_one_phase(name: str, strategy: str, workers: int, updates: int) -> None:
    found = analysed(name)
    phases = found.phases
    assert phases["rank"].tolist() == [0, 1, 2] and set(phases["phase"]) == {0}
    assert phases["role"].tolist() == ["worker"] * workers + ["server"] * (RANKS - workers)
    assert set(phases["strategy"]) == {strategy}
    assert len(found.convergence) == updates and found.convergence["samples"].iloc[-1] == EPOCHS * old_runs.SAMPLES
    assert len(found.metrics) == EPOCHS and found.metrics["metric"].iloc[-1] == 1.0
    assert found.rules.empty
    assert list(zip(found.links["rank"], found.links["peer"], strict=True)) == [(0, 1), (1, 2)]


def test_phases_roles_and_rules_of_a_switch() -> None:
    found = analysed("switch")
    phases = found.phases
    assert list(zip(phases["phase"], phases["rank"], phases["role"], strict=True)) == [
        (0, 0, "worker"), (0, 1, "worker"), (0, 2, "worker"), (1, 0, "worker"), (1, 1, "worker"), (1, 2, "server"),
    ]  # fmt: skip
    rules = found.rules
    assert rules["rule"].tolist() == ["loss_stable"] * 12
    assert rules["samples"].tolist() == list(range(36, 180, 12))
    assert rules["fired"].tolist() == [False] * 11 + [True]
    assert rules["statistic"].tolist()[-3:] == [0.0448, 0.0422, 0.0293] and set(rules["threshold"]) == {0.03}
    assert rules["text"].iloc[-1] == "loss_stable 0.0293 <= 0.03"
    assert found.convergence.groupby("phase").size().to_dict() == {0: 14, 1: 3}


def test_every_kind_of_event_is_read() -> None:
    events = open_run(FOLDERS / "switch").events()
    assert set(events["kind"]) == {"network", "role", "rule", "switch", "checkpoint"}
    assert events.loc[events["kind"] == "checkpoint", "text"].tolist()[0] == "000000000096.safetensors"


@pytest.mark.parametrize("name", mostly_slow(old_runs.JOBS, ["switch"]))
def test_report_is_written_for_old_runs(tmp_path: Path, name: str) -> None:
    page, headline = write_report(copied(tmp_path, name))
    text = page.read_text()
    assert headline in text and "could not be computed" not in text
    assert "loss_stable" in text or name != "switch"


def test_compare_shows_old_runs_side_by_side() -> None:
    runs, faults = compare.read_runs([FOLDERS / name for name in old_runs.JOBS])
    assert faults == []
    by_phase = [(run.workers, run.servers) for run in runs]
    assert by_phase == [((3,), (0,)), ((2,), (1,)), ((2,), (1,)), ((3, 2), (0, 1))]
    assert [run.steps for run in runs] == [16, 24, 44, 17]


# -- checkpoints ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["all_reduce", "parameter_server_sync", "switch"])
def test_mid_run_checkpoint_is_resumed(tmp_path: Path, name: str) -> None:
    """Ends like the uninterrupted run of 0.1: to the bit, if this machine rounds as that one did."""
    resumed, recorded = (
        finished(name, tmp_path, copied(tmp_path, name)),
        load_file(FOLDERS / name / "model.safetensors"),
    )
    whole = finished(name, tmp_path)
    assert resumed.keys() == recorded.keys() == whole.keys()
    alike = all(torch.equal(whole[key], recorded[key]) for key in recorded)
    for key, value in recorded.items():
        torch.testing.assert_close(resumed[key], value, rtol=0 if alike else 1e-4, atol=0 if alike else 1e-6)


def test_asynchronous_checkpoint_is_resumed(tmp_path: Path) -> None:
    """The rest is not deterministic, but starts from the checkpoint: halfway through the run the loss is far lower than
    at the start, and stays so."""
    name = "parameter_server_async"
    folder = copied(tmp_path, name)
    finished(name, tmp_path, folder)
    metrics = open_run(folder).metrics()
    assert metrics["samples"].tolist() == [48, 96, 144, 192]
    assert metrics["loss"].iloc[2] < 0.5 * metrics["loss"].iloc[0]
