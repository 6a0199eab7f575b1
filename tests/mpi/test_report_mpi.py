"""Reports of real runs: a planted straggler is the headline, and the main job writes its report at the end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from markupsafe import escape

from hpctrain import launcher
from hpctrain.analysis import analyse
from hpctrain.analysis.headline import straggler
from tests.conftest import launch

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "jobs" / "digits.toml")
SLOW = 1
STRATEGIES = {
    "sync": ["strategy=parameter_server", "strategy.mode=sync"],
    "switch": ["strategy=switch", "strategy.until={rule = 'after', fraction = 0.5}"],
}
pytestmark = pytest.mark.launch


def run_digits(mpi: launcher.Mpi, folder: Path, ranks: int, *keys: str) -> tuple[Path, str]:
    argv = [*mpi.command(ranks), sys.executable, "-m", "hpctrain", "train", DIGITS, f"output={folder / 'runs'}", *keys]
    ended = launch(argv, mpi, timeout=100)
    assert ended.status == 0, ended.err
    [run] = (folder / "runs").iterdir()
    return run, ended.out


@pytest.mark.any_mpi
@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_straggler_is_the_headline(mpi: launcher.Mpi, tmp_path: Path, name: str) -> None:
    """One of three workers is twice as slow. By how much is not asserted: they share cores with whatever else runs.
    (All strategies and the factor: tests/unit/test_headline.py.)"""
    keys = [*STRATEGIES[name], "train.epochs=6", f"debug.slow={{{SLOW} = 2.0}}", "trace.report=false"]
    run, _ = run_digits(mpi, tmp_path, 4, *keys)
    analysis = analyse(run)
    found = straggler(analysis)
    assert found is not None and found.rank == SLOW, analysis.headline
    if name != "switch":
        assert re.match(rf"\d+% of worker time is waiting for rank {SLOW}, whose", analysis.headline)
    else:
        assert f"ank {SLOW}" in analysis.headline
        late, others = re.search(r"([\d.]+) versions late \(the other workers': ([\d.]+)\)", analysis.headline).groups()  # type: ignore
        assert float(late) > float(others)


@pytest.mark.slow
@pytest.mark.any_mpi
def test_the_main_job_switches_and_ends_with_its_report(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """From all-reduce to two workers and a server; the switch is reported with its reason."""
    keys = ["train.epochs=20", "strategy.until.rounds=5", "strategy.until.threshold=0.05"]
    run, output = run_digits(mpi, tmp_path, 3, *keys)
    assert re.search(r"^switched at sample [\d,]+: loss_stable 0\.\d+ <= 0\.05$", output, re.MULTILINE), output
    assert re.search(r"^ +1  parameter_server \(async\) ", output, re.MULTILINE), output
    assert float(output.partition("test accuracy ")[2].split()[0]) > 0.9
    headline, last = output.splitlines()[-2:]
    assert last == f"report {run / 'report.html'}"
    page = (run / "report.html").read_text()
    assert escape(headline) in page
    assert len(page) < 5e6
