"""The words of a command: the job file and the keys to change stand wherever people put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpctrain.cli import _parser, main
from hpctrain.commandline import parse

JOB = "jobs/digits.toml"
KEYS = ["train.epochs=3", "optimizer.lr=-0.5"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.mark.parametrize(
    "words",
    [
        [JOB, *KEYS, "{options}"],
        [JOB, "{options}", *KEYS],
        ["{options}", JOB, *KEYS],
        ["{options}", *KEYS, JOB],
        [KEYS[0], JOB, "{options}", KEYS[1]],
        [KEYS[0], "{options}", JOB, KEYS[1]],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["train"], []),
        (["run"], ["-n", "3"]),
        (["simulate"], ["--cluster", "clusters/lan1g.toml", "-n", "4", "--learn"]),
        (["job", "show"], []),
    ],
    ids=str,
)
def test_keys_stand_anywhere(command: list[str], options: list[str], words: list[str]) -> None:
    place = words.index("{options}")
    found = parse(_parser(), [*command, *words[:place], *options, *words[place + 1 :]])
    assert found.job == JOB
    assert sorted(found.overrides) == sorted(KEYS)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("command", "option"), [("calibrate", ["--measure", JOB]), ("doctor", ["--job", JOB])], ids=str
)
def test_keys_of_a_job_that_an_option_names(command: str, option: list[str], place: int) -> None:
    parts = [option, ["--cluster", "c.toml"] if command == "calibrate" else ["--json"], [KEYS[0]]]
    parts.insert(place, [KEYS[1]])
    found = parse(_parser(), [command, *(word for part in parts for word in part)])
    assert found.job == JOB
    assert sorted(found.overrides) == sorted(KEYS)


@pytest.mark.parametrize(
    "words", [[JOB, "--resume", *KEYS], [JOB, KEYS[0], "--resume", KEYS[1]], ["--resume", *KEYS, JOB]], ids=" ".join
)
def test_key_after_resume_is_no_run_folder(words: list[str]) -> None:
    found = parse(_parser(), ["train", *words])
    assert (found.resume, found.job) == ("here", JOB)
    assert sorted(found.overrides) == sorted(KEYS)


def test_resume_takes_keys_in_place_of_the_job() -> None:
    found = parse(_parser(), ["train", "--resume", "runs/one", KEYS[0]])
    assert (found.resume, found.job, found.overrides) == ("runs/one", None, [KEYS[0]])


def test_job_file_with_an_equals_sign_in_its_name(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "a=b.toml"
    file.write_text(Path(JOB).read_text())
    assert main(["job", "show", KEYS[0], str(file)]) == 0
    assert "epochs = 3.0" in capsys.readouterr().out


def test_keys_after_options_reach_the_job(tmp_path: Path, capsys: Any) -> None:
    """To the end: a simulation of the job that they change."""
    cluster = tmp_path / "c.toml"
    cluster.write_text("[[hosts]]\ncount = 2\n")
    words = ["simulate", "--cluster", str(cluster), JOB, "--steps", "8", "strategy=local_sgd", "strategy.every=2"]
    assert main([*words, f"output={tmp_path}", "threads=1"]) == 0
    saved = next(tmp_path.glob("digits-simulated*/job.toml")).read_text()
    assert 'name = "local_sgd"\nevery = 2' in saved


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["simulate", JOB, "--cluster", "clusters/lan1g.toml", "--lern", KEYS[0]], "unrecognized arguments: --lern"),
        (["trace", "runs/one", KEYS[0]], "unrecognized arguments: train.epochs=3"),
        (["report", "runs/one", "runs/two"], "unrecognized arguments: runs/two"),
    ],
)
def test_words_that_no_command_knows(words: list[str], text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["simulate", KEYS[0], "--cluster", "clusters/lan1g.toml"], "no job file given"),
        (["job", "show", JOB, "jobs/demo.toml"], "jobs/demo.toml"),
        (["train", KEYS[0]], "no job file given"),
    ],
)
def test_mistakes_in_words_have_one_message(words: list[str], text: str, capsys: Any) -> None:
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert text in errors
    assert "Traceback" not in errors
