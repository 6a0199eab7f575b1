"""The code in the documents runs, and their tables match the program."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.comm.virtual.world import World
from hpctrain.job import Job
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.run.resume import FIXED, FREE
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]


def code_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_strategy_in_architecture_md_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = code_blocks("ARCHITECTURE.md")[0]
    assert text == (ROOT / "hpctrain/strategies/local_sgd.py").read_text()
    (tmp_path / "my_strategies.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_strategies", raising=False)
    job = Job(
        model={"name": "mlp", "inputs": 64, "outputs": 10, "hidden": [32]},
        strategy={"name": "my_strategies:LocalSGD", "every": 4},
        train={"epochs": 6, "batch_size": 16},
        output=str(tmp_path / "runs"),
    )
    results = World(4).run(lambda comm: train(job, comm, out=Narrator(enabled=False)))
    assert results[0].metrics["metric"] > 0.7
    parameters = [list(result.model.parameters()) for result in results]
    for other in parameters[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters[0], other, strict=True))


def test_runs_page_lists_free_and_fixed_keys() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (ROOT / "docs/runs.md").read_text(), re.MULTILINE)
    assert rows == [*FREE.items(), *FIXED.items()]


def test_code_on_the_samples_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *classes = code_blocks("docs/samples.md")
    (tmp_path / "my_metrics.py").write_text("\n".join(classes))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    names: dict[str, Any] = {"__name__": "program"}
    exec(program, names)
    job = names["job"].override([f"output={tmp_path / 'runs'}", "trace.enabled=false"])
    found = [World(ranks).run(lambda comm: train(job, comm, out=Narrator(enabled=False)))[0] for ranks in (1, 3)]
    for result in found:
        assert result.metrics["metric"] > 0.95
        assert result.metrics["loss"] < 0.5
    data = (helpers.points(), helpers.points(9))
    of_its_own = helpers.make_job(tmp_path / "runs", evaluate="my_metrics:Errors", data=data)
    assert 0.0 <= World(2).run(lambda comm: helpers.quiet_train(comm, of_its_own))[0].metrics["metric.error"] <= 1.0
