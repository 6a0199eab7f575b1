"""What people get wrong with the simulator ends with status 2 and one clear message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.replica.replica import Replica
from hpctrain.strategies.all_reduce import AllReduce
from hpctrain.strategies.round import Round

JOB = str(Path(__file__).parents[2] / "jobs" / "digits.toml")
TWO = "[[hosts]]\ncount = 2\n"
CALIBRATION = """
source = "a test"
[model]
name = "convnet"
parameters = 72842
order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
shares = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
[model.forward]
each_s = 1e-5
least = 1.0
most = 64.0
[model.backward]
each_s = 2e-5
"""
SPANS = "".join(f"[spans.{kind}]\neach_s = 1e-10\n" for kind in ("data", "reduce", "update"))


class Looking(AllReduce):
    """Does with the replica what subclasses do."""

    def apply(self, round: Round) -> None:
        self.look(self.phase.replica)
        super().apply(round)

    def look(self, replica: Replica) -> None:
        raise NotImplementedError


class ReadsFloat(Looking):
    def look(self, replica: Replica) -> None:
        float(replica.gradient.abs().max())


class ReadsItem(Looking):
    def look(self, replica: Replica) -> None:
        replica.gradient.norm().item()


class ReadsMask(Looking):
    def look(self, replica: Replica) -> None:
        replica.gradient[replica.gradient > 0].sum()


class ReadsTruth(Looking):
    def look(self, replica: Replica) -> None:
        assert not (replica.gradient > 1e9).any()


class ReadsUnique(Looking):
    def look(self, replica: Replica) -> None:
        replica.gradient.unique()


class ReadsText(Looking):
    def look(self, replica: Replica) -> None:
        f"{replica.gradient.max():.3f}".strip()


class MakesArray(Looking):
    def look(self, replica: Replica) -> None:
        np.asarray(replica.value_buffer)


class MakesArrayOfTensor(Looking):
    def look(self, replica: Replica) -> None:
        replica.gradient.numpy()


class SumsArray(Looking):
    def look(self, replica: Replica) -> None:
        np.sum(replica.value_buffer)


class ReadsElement(Looking):
    def look(self, replica: Replica) -> None:
        assert replica.value_buffer[0] < 1e9


class ReadsBytes(Looking):
    def look(self, replica: Replica) -> None:
        memoryview(replica.value_buffer)


READERS = [
    ReadsFloat, ReadsItem, ReadsMask, ReadsTruth, ReadsUnique, ReadsText, MakesArray, MakesArrayOfTensor, SumsArray,
    ReadsElement, ReadsBytes,
]  # fmt: skip


def status_and_message(words: list[str], capfd: Any) -> tuple[int, str]:
    status = main(["simulate", JOB, "strategy=all_reduce", "train.epochs=1", "threads=1", *words])
    errors: str = capfd.readouterr().err
    return status, errors


def check(words: list[str], text: str, capfd: Any) -> None:
    status, errors = status_and_message(words, capfd)
    assert status == 2
    assert text in errors
    assert errors.startswith("hpctrain: ")
    assert errors.count("\n") == 1


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(TWO)
    Path("known.toml").write_text(CALIBRATION + SPANS)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (f'{TWO}[link]\nmbit_per_s = "1 Gbit"\n', 'c.toml: link.mbit_per_s = "1 Gbit": must be a number, at least 0.1'),
        (f"{TWO}[link]\nmbit_per_s = 0\n", "c.toml: link.mbit_per_s = 0: must be a number, at least 0.1"),
        (f"{TWO}[link]\nmbit_per_s = inf\n", "link.mbit_per_s = inf: must be a number"),
        (f"{TWO}[link]\nlatency_ms = -1\n", "link.latency_ms = -1"),
        (f"{TWO}speed = 0.0\n", "hosts.0.speed = 0"),
        (f"{TWO}memory_gbyte_per_s = 0\n", "hosts.0.memory_gbyte_per_s = 0"),
        (f'{TWO}cores = "half"\n', 'hosts.0.cores = "half"'),
        (f"{TWO}slow = {{every_s = 1.0, for_s = 2.0, factor = 2.0}}\n", "hosts.0.slow"),
        ("[[hosts]]\ncount = 5000\n", "5000"),
        ('name = "none"\n', "hosts: is missing"),
        ("", "hosts: is missing"),
        ("[[hosts]\n", "c.toml is not valid TOML"),
        (CALIBRATION + SPANS, "c.toml is a calibration file, not a cluster file"),
        (Path(JOB).read_text(), "c.toml is a job file, not a cluster file"),
    ],
)
def test_cluster_that_cannot_be(content: str, text: str, capfd: Any) -> None:
    Path("c.toml").write_text(content)
    check(["--cluster", "c.toml", "--calibration", "known.toml"], text, capfd)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ranks=16"], "ranks = 16: a job that needs 16 ranks was started with 2"),
        (["-n", "3"], "-n 3: the cluster has places for 1 to 2 ranks"),
        (["-n", "0"], "-n 0: the cluster has places for 1 to 2 ranks"),
        (["strategy=parameter_server", "strategy.servers=2"], "of 2 ranks at most 1 can be servers"),
        (["--steps", "0"], "--steps 0: at least 1 is needed"),
        (["--cluster", "none.toml"], "there is no cluster file none.toml"),
        (["--cluster", "."], "is a folder, not a cluster file"),
        (["train.batch_size=2000"], "has measured batches of 1 to 64 samples"),
        (["train.sync_batchnorm=true"], "train.sync_batchnorm = true: what layers exchange"),
        (["optimizer=Adafactor"], "optimizer Adafactor reads numbers that a simulation of costs does not have"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_job_that_does_not_fit(words: list[str], text: str, capfd: Any) -> None:
    check(["--cluster", "c.toml", "--calibration", "known.toml", *words], text, capfd)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Path(JOB).read_text(), "is a job file, not a calibration file (hpctrain calibrate writes one)"),
        (TWO, "is a cluster file, not a calibration file"),
        ("", "model: is missing"),
        ("[model\n", "is not valid TOML"),
        (CALIBRATION, 'the calibration (a test) does not tell what "data" costs, which this job does; calibrate with'),
        (CALIBRATION + "[spans.data]\n", 'does not tell what "update" costs'),
        (CALIBRATION.replace("2e-5", '"20 us"') + SPANS, 'model.backward.each_s = "20 us": must be a number'),
        (CALIBRATION.replace("2e-5", "-2e-5") + SPANS, "model.backward.each_s = -2e-05"),
        (CALIBRATION.replace("[9, 8", "[9, 9") + SPANS, "order must have each parameter's index (0, 1, ...) once"),
        (CALIBRATION.replace("[0.1,", "[0.9,") + SPANS, "shares must add up to 1"),
        (CALIBRATION.replace("72842", "99") + SPANS, "is of a model with 99 parameters, but this job's has 72,842"),
        (CALIBRATION + SPANS + "[span]\n", "span: unknown key (did you mean spans?)"),
    ],
)
def test_calibration_that_cannot_be_used(content: str, text: str, capfd: Any) -> None:
    Path("known.toml").write_text(content)
    check(["--cluster", "c.toml", "--calibration", "known.toml"], text, capfd)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: str(reader.__name__))
def test_strategy_that_reads_numbers_is_told_to_learn(reader: type, capfd: Any) -> None:
    name = f"{reader.__module__}:{reader.__name__}"
    words = [f"strategy.name={name}", "strategy.exchange=message", "--cluster", "c.toml", "--calibration", "known.toml"]
    text = f"strategy {name} or optimizer SGD reads numbers that a simulation of costs does not have"
    check(words, text, capfd)


def test_same_strategy_learns(capfd: Any) -> None:
    """The refusal says so."""
    words = [f"strategy.name={__name__}:ReadsItem", "strategy.exchange=message", "--learn"]
    status, errors = status_and_message(["--cluster", "c.toml", "--calibration", "known.toml", *words], capfd)
    assert (status, errors) == (0, "")


def test_error_of_a_strategy_that_has_to_do_with_no_numbers_is_its_own(capfd: Any) -> None:
    words = [f"strategy.name={__name__}:Looking", "--cluster", "c.toml", "--calibration", "known.toml"]
    with pytest.raises(NotImplementedError):
        status_and_message(words, capfd)


def test_cluster_or_calibration_is_no_job(capfd: Any) -> None:
    for name in ("c.toml", "known.toml"):
        assert main(["simulate", name, "--cluster", "c.toml"]) == 2
    errors = capfd.readouterr().err
    assert "c.toml is a cluster file, not a job file" in errors
    assert "known.toml is a calibration file, not a job file" in errors
