"""tests/gpu/machine.py: what it installs, and what it leaves alone, on a machine with a GPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import machine
from tests.gpu.machine import BENEATH, MPI, NEEDED, ROOT, WITHOUT_REQUIREMENTS, MachineError

OWN = {"torch": "2.8.0+cu128", "numpy": "2.1.3", "cupy-cuda12x": "14.0.1", "typing-extensions": "4.9.0"}


@pytest.mark.parametrize(
    ("packages", "python", "sentence"),
    [
        (OWN, (3, 10), r"needs Python 3\.11 or newer, not 3\.10"),
        ({"numpy": "2.0"}, (3, 12), r"has no torch; name the Python that has it: make test-gpu PYTHON="),
        ({**OWN, "torch": "2.7.1+cu126"}, (3, 12), r"has torch 2\.7\.1\+cu126, but 2\.8 or newer is needed"),
        ({**OWN, "numpy": "1.26.4"}, (3, 12), r"has numpy 1\.26\.4, but 2 or newer"),
    ],
)
def test_unfit_machine_is_one_sentence(packages: dict[str, str], python: tuple[int, int], sentence: str) -> None:
    with pytest.raises(MachineError, match=sentence):
        machine.check(packages, python)


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0a0+git1", "3.0"])
def test_newer_torch_and_missing_cupy_are_accepted(version: str) -> None:
    machine.check({"torch": version, "numpy": "2.4.6"}, (3, 13))


def test_the_machines_torch_numpy_and_cupy_stay_as_they_are() -> None:
    lines = machine.constraints(OWN, (ROOT / "constraints.txt").read_text())
    assert {"torch==2.8.0+cu128", "numpy==2.1.3", "cupy-cuda12x==14.0.1"} <= set(lines)
    names = [line.partition("==")[0] for line in lines]
    assert names.count("torch") == names.count("numpy") == 1
    assert "typing_extensions" not in names  # may be replaced in .venv-gpu by a newer one
    assert any(line.startswith("h5py==") for line in lines)


def test_everything_that_is_needed_has_a_tested_version() -> None:
    pins = {plain(line) for line in (ROOT / "constraints.txt").read_text().split()}
    names = {plain(name) for name in (*NEEDED, MPI, *WITHOUT_REQUIREMENTS, *BENEATH)}
    assert names <= pins
    assert not {"torch", "numpy", "scipy"} & names


def plain(requirement: str) -> str:
    return re.split("[=>]=", requirement)[0].lower().replace("_", "-")


def test_collecting_wheels_never_asks_for_torch_and_checks_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(command: list[str]) -> None:
        asked.extend(command)
        with open(tmp_path / "a.whl", "wb") as file:
            file.truncate(size)

    monkeypatch.setattr(machine, "_call", download)
    size = 34 << 20
    machine.collect(tmp_path, "3.12")
    assert {"--no-deps", "--only-binary=:all:", "3.12", "mpi4py>=4.1", "mpich"} <= set(asked)
    assert not {"torch", "numpy"} & set(asked)
    size = 61 << 20
    with pytest.raises(MachineError, match="larger than 60 MiB"):
        machine.collect(tmp_path, "3.12")


def test_a_part_that_takes_too_long_is_interrupted_and_may_clean_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where interrupts are ignored, as in the background of a script."""
    program = f"""
import pathlib, time
try:
    pathlib.Path(r"{tmp_path}/begun").touch()
    time.sleep(60)
finally:
    pathlib.Path(r"{tmp_path}/cleaned").touch()
"""
    monkeypatch.setattr(machine, "SECONDS", {"tests": 3.0})  # Python may start slowly
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.monotonic()
    try:
        assert machine.within("tests", [sys.executable, "-c", program]) == 124
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 12
    assert (tmp_path / "cleaned").exists() == (tmp_path / "begun").exists()
    assert machine.within("tests", [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_a_failure_is_the_status_although_the_rest_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def within(part: str, command: list[str]) -> int:
        done.append(part)
        return 5 * (part == "tests")

    monkeypatch.setattr(machine, "within", within)
    monkeypatch.setattr(machine, "_no_bench", lambda python: None)
    assert machine.run(Path(sys.executable), tmp_path / "out") == 5
    assert done == ["tests", "bench"]


@pytest.mark.parametrize(
    ("gpus", "choices", "reason"),
    [
        ((0, None), ("device",), "torch sees no GPU here"),
        ((0, "CuPy cannot be imported"), ("device",), "CuPy cannot be imported"),
        ((1, None), ("step",), "hpctrain bench has no `device`"),
        ((1, None), ("step", "device"), ""),
    ],
)
def test_bench_is_left_out_with_a_reason(
    gpus: tuple[int, str | None], choices: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("hpctrain.bench.CHOICES", choices)
    monkeypatch.setattr("hpctrain.comm.device.gpu.usable_gpus", lambda: gpus)
    exec(machine.WHY_NOT, {})
    assert capsys.readouterr().out.strip() == reason


def test_script_names_the_reason_and_ends_with_status_2(tmp_path: Path) -> None:
    """A Python without torch: -S hides the packages."""
    done = subprocess.run(
        [sys.executable, "-S", machine.__file__, "--out", tmp_path], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("test-gpu: ")
    assert "has no torch" in done.stderr
