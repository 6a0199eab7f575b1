"""The study: what runs, what is kept, bytes on links, payloads, the arithmetic of its tables, and its page."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpctrain.codecs import codec_by
from hpctrain.codecs.base import Codec
from hpctrain.codecs.joint import JointCodec
from hpctrain.codecs.wire import WireCodec
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError, DataError
from hpctrain.job import Job
from hpctrain.study.case import Case, Setting, Variant, cases
from hpctrain.study.host import milliseconds
from hpctrain.study.kept import Kept
from hpctrain.study.page import Prose, Study, write
from hpctrain.study.payload import message_bytes, model_layout, payload_per_step, ratios, steps_per_round
from hpctrain.study.runs import chosen, figures_of, run_missing
from hpctrain.study.slow import train_in_laboratory
from hpctrain.study.table import Line, Wanted, lines
from hpctrain.study.virtual import CountingNetwork, Jitter, LinkBytes, per_step, train_virtually

ROOT = Path(__file__).resolve().parents[2]
BASE = Variant("all_reduce", ("strategy=all_reduce",))
ROWS = {
    "all_reduce": BASE,
    "topk 1 %": Variant("topk 1 %", ("strategy=all_reduce", "strategy.codec=topk")),
    "server": Variant("server", ("strategy=parameter_server", "strategy.mode=sync")),
    "H=4": Variant("H=4", ("strategy=local_sgd", "strategy.every=4")),
}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """An MLP 64-32-10 on the digits, three workers."""
    file = tmp_path / "job.toml"
    file.write_text(
        '[model]\nname = "mlp"\ninputs = 64\nhidden = [32]\n[data]\nname = "digits"\n'
        "[train]\nepochs = 0.5\nbatch_size = 16\nevaluate_every = {fraction = 1}\n"
    )
    return Setting("digits3", "an MLP on the digits", file, 3, ROWS, "all_reduce", seeds=2)


# -- what runs ---------------------------------------------------------------------------------------------------
def test_runs_of_the_first_seed_come_first(setting: Setting) -> None:
    names = [case.name for case in cases([setting])]
    assert names[:4] == ["digits3/all-reduce.0", "digits3/topk-1-percent.0", "digits3/server.0", "digits3/h-4.0"]
    assert [name[-1] for name in names] == ["0"] * 4 + ["1"] * 4
    assert [case.name for case in chosen(cases([setting]), "topk")] == [names[1], names[5]]
    assert [case.name for case in chosen(cases([setting]), "*/s*.1")] == ["digits3/server.1"]


def test_servers_are_ranks_of_their_own(setting: Setting) -> None:
    assert [Case(setting, row, 0).ranks() for row in ROWS.values()] == [3, 3, 4, 3]
    beside = Variant("beside", ("strategy=parameter_server", "strategy.colocated=true"))
    assert Case(setting, beside, 0).ranks() == 3
    both = Variant("both", ("strategy=switch",))  # all ranks are workers, then one serves
    with pytest.raises(ClusterError, match="both cannot have 3 workers in all of its phases"):
        Case(setting, both, 0).ranks()


def test_results_are_kept_and_those_of_other_keys_are_not_used(setting: Setting, tmp_path: Path) -> None:
    kept, case = Kept(tmp_path / "kept"), Case(setting, BASE, 1)
    assert kept.find(case) is None
    kept.keep(case, {"metric": 0.5})
    assert json.loads((tmp_path / "kept/digits3/all-reduce.1.json").read_text())["metric"] == 0.5
    about = {"setting": "digits3", "row": "all_reduce", "seed": 1, "digest": case.digest}
    assert kept.find(case) == {**about, "metric": 0.5}
    other = Variant("all_reduce", ("strategy=all_reduce", "optimizer.lr=0.3"))
    assert kept.find(Case(setting, other, 1)) is None
    assert kept.find(Case(setting, BASE, 0)) is None
    (tmp_path / "kept/digits3/all-reduce.1.json").write_text("{")
    with pytest.raises(DataError, match=r"all-reduce.1.json is no result of a study .*; remove it"):
        kept.find(case)


def test_a_study_goes_on_where_it_stopped(setting: Setting, tmp_path: Path) -> None:
    kept, said = Kept(tmp_path / "kept"), list[str]()
    todo = [case for case in cases([setting]) if case.row is BASE]
    assert not run_missing(todo, kept, 0.0, said.append)  # no time
    assert run_missing(todo, kept, 600.0, said.append, part=(1, 2))
    assert [kept.find(case) is not None for case in todo] == [False, True]
    assert run_missing(todo, kept, 600.0, said.append)
    assert len(said) == 2
    assert run_missing(todo, kept, 600.0, said.append)
    assert len(said) == 2


def test_a_run_that_fails_is_said_and_left_out(setting: Setting, tmp_path: Path) -> None:
    said, wrong = list[str](), Variant("wrong", ("strategy=all_reduce", "strategy.codec=zip"))
    assert not run_missing([Case(setting, wrong, 0)], Kept(tmp_path / "kept"), 600.0, said.append)
    assert len(said) == 1
    assert said[0].startswith("digits3/wrong.0: ")
    assert "strategy.codec" in said[0]


# -- what is sent ------------------------------------------------------------------------------------------------
def test_a_network_counts_what_crosses_it() -> None:
    network = CountingNetwork()
    network.transfer(0, 1, 100, 0)
    network.transfer(1, 1, 7, 0)
    assert network.transfer(2, 1, 20, 5) == (5, 5)
    assert [network.of(node) for node in range(3)] == [LinkBytes(100, 0), LinkBytes(0, 120), LinkBytes(20, 0)]


def test_bytes_per_step_are_those_of_whole_rounds() -> None:
    marks = [LinkBytes(1000, 50), *(LinkBytes(1000 + 8 * (step // 4), 50 + 4 * (step // 4)) for step in range(1, 11))]
    assert per_step(marks, 4) == LinkBytes(2.0, 1.0)  # 8 steps of two rounds; the rest is of no whole one
    assert per_step(marks[:3], 4) == LinkBytes(0.0, 0.0)
    assert per_step(marks[:1], 1) == LinkBytes(0.0, 0.0)


@pytest.mark.parametrize(
    ("row", "sums"),
    [("all_reduce", 4 / 3), ("topk 1 %", 2.0), ("server", 1.0), ("H=4", 4 / 3 / 4)],  # halving and doubling among three
)
def test_links_of_a_run_carry_what_the_method_says(setting: Setting, row: str, sums: float) -> None:
    """A worker receives so many times what a message takes, and in each round a little about the others, or from the
    server."""
    case = Case(setting, ROWS[row], 0)
    job = case.job()
    message = message_bytes(getattr(job.schedule[0].strategy.options, "codec", "none"), model_layout(job))
    found = train_virtually(job, range(case.ranks()), 0, steps_per_round(job))
    assert found.workers == (0, 1, 2)
    mean = sum(found.links[rank].received for rank in found.workers) / 3
    assert 0 < mean - sums * message < 700 / steps_per_round(job)
    if row == "server":
        sent = sum(found.links[rank].sent for rank in found.workers)
        assert found.links[3].sent == pytest.approx(3 * mean)
        assert found.links[3].received == pytest.approx(sent)
        assert 0 < sent - 3 * message < 2100


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), 247_040),
        (("strategy.codec=bfloat16",), 123_520),
        (("strategy.codec=topk",), 15 * 41 * 6 + 3 * 6),  # 15 chunks of 4,096, and one of 320
        (("strategy.codec=powersgd",), 4 * 2 * (31 + 166 + 520 + 204 + 94) + 4 * 236),
        (("strategy=local_sgd", "strategy.every=8"), 247_040 / 8),
        (("strategy=local_sgd", "strategy.every=10", "strategy.codec=bfloat16"), 12_352),
    ],
)
def test_payloads_follow_from_shapes(keys: tuple[str, ...], expected: float) -> None:
    job = Job.load(ROOT / "jobs" / "study_mnist.toml", keys)
    assert payload_per_step(job, model_layout(job)) == expected


def test_powersgd_takes_a_hundredth_of_a_large_mlp() -> None:
    keys = ["model={name='mlp', inputs=784, hidden=[1024, 1024]}"]
    found = ratios(Job.load(ROOT / "jobs" / "study_mnist.toml", keys))
    assert 100 < found["powersgd"] < found["acp"]
    assert found["bfloat16"] == 2.0


def test_figures_of_a_run(setting: Setting) -> None:
    found = figures_of(Case(setting, ROWS["topk 1 %"], 0))
    assert found["full"] == 2416 * 4
    assert found["payload"] == message_bytes("topk", model_layout(Case(setting, BASE, 0).job()))
    assert 0.0 < found["metric"] < 1.0
    assert found["samples"] == 720
    assert found["busiest"] >= found["received"] > 2 * found["payload"]


# -- with real ranks ---------------------------------------------------------------------------------------------
def test_a_step_is_timed_over_whole_rounds(tmp_path: Path) -> None:
    """On virtual ranks, where a step takes about 10 ms, and the slowest of three in a round 13 ms."""
    file = tmp_path / "job.toml"
    file.write_text(
        '[model]\nname = "tests.helpers:noisy_net"\n[data]\nname = "tests.helpers:limited_pictures"\n'
        "[train]\nbatch_size = 2\n"
    )
    setting = Setting("pictures3", "noisy pictures", file, 3, ROWS, "all_reduce")
    given = [Case(setting, ROWS[name], 0) for name in ("all_reduce", "server", "H=4")]
    world = World(4, (0,) * 4, compute=Jitter(0))
    found = world.run(lambda comm: milliseconds(comm, given))
    assert all(other == found[0] for other in found)
    assert list(found[0]) == ["all_reduce", "server", "H=4"]
    assert all(10.0 < ms < 16.0 for ms in found[0].values())
    assert found[0]["H=4"] < found[0]["all_reduce"]  # four steps even out


def test_a_run_in_the_laboratory_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, status = tmp_path / "four.toml", 0

    def run(path: Path, words: list[str], count: int | None) -> int:
        assert path == cluster
        assert words[1:6] == ["-m", "hpctrain", "train", "job.toml", "train.epochs=1"]
        assert "strategy=parameter_server" in words
        [output] = [word.partition("=")[2] for word in words if word.startswith("output=")]
        folder = Path(output, "run-1")
        folder.mkdir()
        columns = "step,samples,epoch,seconds,split,loss,metric"
        (folder / "metrics.csv").write_text(f"{columns}\n5,100,0.5,1.5,test,2.0,0.1\n9,200,1,3.5,test,1.0,0.6\n")
        return status

    monkeypatch.setattr("hpctrain.lab.command.run", run)
    found = train_in_laboratory(cluster, Path("job.toml"), ["train.epochs=1"], ROWS["server"])
    assert found == {"seconds": 3.5, "samples": 200.0, "loss": 1.0, "metric": 0.6}
    status = 1
    with pytest.raises(ClusterError, match=r"study: server on four.toml ended with status 1"):
        train_in_laboratory(cluster, Path("job.toml"), ["train.epochs=1"], ROWS["server"])


# -- the table ---------------------------------------------------------------------------------------------------
def frame(**rows: list[tuple[int, float, float]]) -> pd.DataFrame:
    """By row: (seed, metric, loss) of each run; a row named `half` sends half."""
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "metric": metric, "loss": loss, "payload": 50.0 if row == "half" else 100.0,
             "received": 70.0, "busiest": 1e6 if row == "half" else 8e6}
            for row, runs in rows.items() for seed, metric, loss in runs
        ]
    )  # fmt: skip


def test_rows_are_compared_with_the_base_seed_by_seed() -> None:
    found = frame(half=[(0, 0.90, 0.3), (1, 0.94, 0.3), (2, 0.95, 0.3)], base=[(0, 0.92, 0.1), (1, 0.95, 0.3)])
    half, base = lines(found, ["half", "none", "base"], "base")
    assert (half.row, base.row, half.seeds, base.seeds) == ("half", "base", 3, 2)
    assert half.mean == pytest.approx(0.93)
    assert half.spread == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.02**2) / 2))
    assert half.points == pytest.approx(-1.5)  # of seeds 0 and 1: -2 and -1
    assert half.error == pytest.approx(0.5)
    assert half.loss_change == pytest.approx(0.5)
    assert (half.saved, half.link_saved) == (2.0, 8.0)
    assert (base.points, base.error, base.saved) == (0.0, 0.0, 1.0)
    assert half.wire_seconds(100e6) == pytest.approx(0.08)


def test_rows_without_a_base_are_not_compared() -> None:
    [line] = lines(frame(half=[(0, 0.9, 0.3)]), ["half", "base"], "base")
    assert (line.mean, line.spread) == (0.9, 0.0)
    assert math.isnan(line.points)
    assert math.isnan(line.saved)
    assert lines(pd.DataFrame(), ["half"], "base") == []


@pytest.mark.parametrize(
    ("measure", "bound", "met"),
    [
        ("points", 1.51, True),
        ("points", 1.49, False),
        ("loss", 0.51, True),
        ("loss", 0.49, False),
        ("payload", 2.0, True),
        ("payload", 2.01, False),
    ],
)
def test_targets(measure: Any, bound: float, met: bool) -> None:
    found = frame(half=[(0, 0.90, 0.3), (1, 0.94, 0.3)], base=[(0, 0.92, 0.1), (1, 0.95, 0.3)])
    found["payload"] *= found["row"].map({"half": 1.001, "base": 1.0})  # 1.998 times less: 2 to three digits
    half: Line = lines(found, ["half"], "base")[0]
    assert Wanted("half", measure, bound).verdict(half)[1] is met


# -- the page ----------------------------------------------------------------------------------------------------
def test_page_shows_what_has_run(setting: Setting, tmp_path: Path) -> None:
    wanted = [("digits3", Wanted("topk 1 %", "payload", 50)), ("digits3", Wanted("H=4", "points", 1))]
    study = Study([setting], wanted, Kept(tmp_path / "study"), setting, ROWS, {"net": Case(setting, BASE, 0).job()})
    figures = {"metric": 0.9, "loss": 0.5, "payload": 100.0, "received": 170.0, "busiest": 125_000.0}
    for seed in range(2):
        study.kept.keep(Case(setting, BASE, seed), figures)
        sparse = {**figures, "payload": 1.5, "metric": 0.88 + 0.01 * seed}
        study.kept.keep(Case(setting, ROWS["topk 1 %"], seed), sparse)
    study.note("host", {"all_reduce": {"ms": 2.0, "runs": [2.0]}}, ROWS)
    slow = {"seconds": 2.0, "samples": 3000.0, "metric": 0.5}
    study.note("slow", {"server": slow, "all_reduce": {**slow, "seconds": 4.0}}, ROWS)
    write(study, Prose(*("# head", "advice", "reading", "shapes", "slow", "rates")), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "job.toml: 4 of 8 runs." in page
    assert "| topk 1 % | 0.8850 ± 0.0071 (2) | -1.50 ± 0.50 | 0.5000 | 1.5 | 66.7 | 170 | 125,000 | 1 |" in page
    assert "| all_reduce | 2.0 | 102.0 | 12.0 | 3.0 |" in page  # a megabit
    assert "| topk 1 % | – | – + 100.0 | – + 10.0 | – + 1.0 |" in page
    assert "| an MLP on the digits | topk 1 % | payload 50 times less | 66.7 times less | **yes** |" in page
    assert "| an MLP on the digits | H=4 | metric at most 1 points below | not run | – |" in page
    assert "| bfloat16 | 2 |" in page
    assert "| server | 2.0 | 0.50 | 1,500 | 0.5000 |" in page
    for picture in ("digits3.png", "steps.png"):
        assert f"](study/{picture})" in page
        assert (tmp_path / "study" / picture).read_bytes().startswith(b"\x89PNG")


def test_measurements_of_other_keys_are_not_shown(setting: Setting, tmp_path: Path) -> None:
    study = Study([setting], [], Kept(tmp_path / "study"), setting, ROWS, {})
    study.note("slow", {"server": {"seconds": 2.0}, "all_reduce": {"seconds": 1.0}}, ROWS)
    assert list(study.measured("slow", ROWS)) == ["all_reduce", "server"]
    other = {**ROWS, "server": Variant("server", ("strategy=parameter_server",))}
    assert list(study.measured("slow", other)) == ["all_reduce"]
    assert study.measured("host", ROWS) == {}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What analysis/study.py defines."""
    monkeypatch.setattr(sys, "argv", ["study.py"])
    return runpy.run_path(str(ROOT / "analysis" / "study.py"))


def test_a_quick_study_has_a_row_of_every_kind(script: dict[str, Any], tmp_path: Path) -> None:
    def kinds(given: list[Case]) -> set[tuple[str, str]]:
        """Strategies (whether servers are asynchronous), kinds of codec, models."""
        found = set()
        for case in given:
            job = case.job()
            options = job.schedule[0].strategy.options
            mode = getattr(options, "mode", "sync").replace("bounded", "async")
            codec = codec_by(getattr(options, "codec", "none"))
            base = next(kind for kind in (WireCodec, JointCodec, Codec) if isinstance(codec, kind))
            strategy = job.schedule[0].strategy.name
            found |= {("strategy", f"{strategy} {mode}"), ("codec", base.__name__), ("model", job.model.name)}
        return found

    quick = list(cases(script["quick"](tmp_path).settings))
    assert kinds(quick) == kinds([case for case in cases(script["SETTINGS"]) if case.seed == 0])
    assert len(quick) < 12


def test_rows_of_the_study_can_run_and_its_targets_have_rows(script: dict[str, Any]) -> None:
    settings = {setting.name: setting for setting in script["SETTINGS"]}
    every = list(cases(list(settings.values())))
    assert len({case.name for case in every}) == len(every)
    for case in every:
        if case.seed == 0:
            assert case.ranks() - case.setting.workers in (0, 1), case.name
    assert all(target.row in settings[name].rows for name, target in script["TARGETS"])
    assert all(setting.base in setting.rows for setting in settings.values())
