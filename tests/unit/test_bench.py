"""`hpctrain bench`: its tables, its JSON, and that it runs with and without a launcher."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpctrain import bench
from hpctrain.bench import alone, together
from hpctrain.bench.report import Report, Sample, Table, number
from hpctrain.cli import main
from hpctrain.comm.network import FreeNetwork
from hpctrain.comm.virtual import World
from hpctrain.errors import HpctrainError


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    """Every measurement, but short."""
    torch.set_num_threads(1)
    monkeypatch.setattr(alone, "RANKS", 8)
    monkeypatch.setattr(together, "SECONDS", 0.0)
    monkeypatch.setattr(together, "STRETCH", 0.0)
    monkeypatch.setattr(together, "FEWEST", 2)
    monkeypatch.setattr(together, "SIZES", {"4 KiB": 4096, "16 KiB": 16384})
    load = together.Load(lambda: torch.nn.Linear(6, 10), (6,), 4, 2, 2)
    monkeypatch.setattr(together, "LOADS", {"linear": load})


def silent(text: str) -> None:
    pass


def test_a_sample_is_its_median_and_middle_half():
    sample = Sample((5.0, 1.0, 2.0, 4.0, 3.0), "ms")
    assert (sample.median, sample.quartiles) == (3, (2, 4))
    assert str(sample) == "3 (2-4)"


def test_numbers_have_three_digits():
    assert [number(x) for x in (0.01234, 1.236, 45.67, 345.6, 234567.8)] == [
        "0.0123",
        "1.24",
        "45.7",
        "346",
        "234,568",
    ]


def test_a_table_is_aligned():
    table = Table("t", "title, ms", ["a", "bb"])
    table.rows = {"first": {"a": Sample((1,), "ms"), "bb": Sample((1000,), "ms")}, "no": {"a": Sample((2,), "ms")}}
    assert table.text().splitlines() == [
        "title, ms",
        "             a                   bb",
        "first  1 (1-1)  1,000 (1,000-1,000)",
        "no     2 (2-2)                    -",
    ]


def test_virtual_ranks_are_counted():
    rates = alone.ring_rates(8, FreeNetwork(), apart=False)
    assert rates[1] > rates[0] > 0
    table = alone.measure_virtual(silent)
    assert set(table.rows) == set(alone.NETWORKS)


def test_the_cost_of_a_span():
    assert 0 < alone.measure_trace(silent).rows["span"]["us"].median < 1000


@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 1)])
def test_all_reduce_by_algorithm_and_size(nodes):
    tables = World(3, nodes).run(lambda comm: together.measure_all_reduce(comm, silent))
    one_node = len(set(nodes)) == 1
    assert set(tables[0].rows) == {*together.ALGORITHMS, *([together.SHARED] if one_node else [])}
    assert all(set(cells) == set(together.SIZES) for cells in tables[0].rows.values())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_the_shared_sum_gives(size):
    def body(comm):
        shared = together.SharedSum(comm, 1000)
        for step in range(3):
            shared.given.mine[:] = np.arange(1000) + comm.rank + step
            shared.run()
            assert (shared.summed.parts[0] == size * (np.arange(1000) + step) + sum(range(size))).all()
            comm.barrier()
        shared.free()

    World(size).run(body)


@pytest.mark.parametrize("size", [1, 3])
def test_steps_by_strategy(size):
    tables = World(size).run(lambda comm: together.measure_step(comm, silent))
    assert set(tables[0].rows) == set(together.WAYS)
    assert len(tables[0].rows["all_reduce, shared"]["linear"].values) == 4


@pytest.mark.parametrize("way", [way for way in together.WAYS.values() if way is not None])
def test_the_step_that_is_measured_trains(way):
    """All ranks hold the same parameters after a block, and not those before."""

    def body(comm):
        steps = together.StepBench(comm, together.LOADS["linear"])
        before = next(steps.replica.model.parameters()).detach().clone()
        steps.block(way)
        return before, next(steps.replica.model.parameters()).detach()

    got = World(2).run(body)
    assert not torch.equal(got[0][0], got[0][1])
    assert torch.equal(got[0][1], got[1][1])


def test_which_measurements_need_ranks():
    assert bench.wants_ranks("all", {})
    assert bench.wants_ranks("step", {"PATH": "/bin"})
    assert not bench.wants_ranks("virtual", {})
    assert not bench.wants_ranks("trace", {})
    for launcher in ({"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "4"}, {bench.STARTED: "x"}):
        assert not bench.wants_ranks("all", launcher)


def test_the_mark_is_the_launchers():
    from hpctrain import launcher

    assert launcher.MARK == bench.STARTED


def test_figures_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"
    assert main(["bench", "trace", "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    assert told["trace"]["rows"]["span"]["us"]["unit"] == "us"
    out = capsys.readouterr()
    assert "cost of a span" in out.out
    assert out.err == "bench: trace\n"


@pytest.mark.parametrize("name", ["no such folder/figures.json", "."])
def test_a_file_that_cannot_be_written_is_known_before(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "trace", "--json", name]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"hpctrain: --json {name}: ")
    assert "bench: trace" not in out.err
    with pytest.raises(HpctrainError, match="--json"):
        bench.check_path(name)


def test_a_report_has_all_its_tables():
    tables = [Table("a", "A, ms", ["x"]), Table("b", "B, us", ["y"])]
    report = Report(tables)
    assert "A, ms" in report.text()
    assert set(report.plain()) == {"machine", "a", "b"}


@pytest.mark.launch
def test_bench_starts_ranks_itself(tmp_path: Path):
    """One size and the real launcher; the whole of it is `hpctrain bench`."""
    import subprocess

    program = tmp_path / "bench.py"
    program.write_text(
        "import sys\n"
        "from hpctrain.bench import together\n"
        "together.SIZES = {'4 KiB': 4096}\n"
        "together.SECONDS = 0.0\n"
        "from hpctrain.cli import main\n"
        "sys.exit(main(['bench', 'all_reduce', '--json', sys.argv[1]]))\n"
    )
    from hpctrain import launcher

    code = "import sys; from hpctrain import launcher; sys.exit(launcher.run(2, sys.argv[1:]))"
    path = tmp_path / "figures.json"
    root = str(Path(launcher.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, str(program), str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    assert "all-reduce of 2 ranks" in done.stdout
    assert done.stderr.splitlines()[0] == "bench: all-reduce of 4 KiB"
    assert set(json.loads(path.read_text())["all_reduce"]["rows"]) >= {"library", together.SHARED}
