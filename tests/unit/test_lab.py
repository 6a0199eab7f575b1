"""Which clusters the laboratory builds; the hosts themselves are in tests/hosts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpctrain.cli import main
from hpctrain.errors import ClusterError
from hpctrain.hosts import Description
from hpctrain.lab import buildable, machine
from hpctrain.lab.check import LimitCheck

CLUSTERS = Path(__file__).resolve().parents[2] / "clusters"


@pytest.mark.parametrize("name", ["lan2", "lan4", "slow2", "slow4"])
def test_laboratory_loads_its_own_clusters(name: str) -> None:
    assert buildable.load(CLUSTERS / f"{name}.toml").name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[hosts]]\ncount = 80\n", "80 hosts; at most 64 fit on one machine"),
        ("[[hosts]]\n[[hosts]]\nspeed = 0.5\n", r"cannot build speed of node2 \(give slower hosts fewer `cores`\)\."),
        ("[[hosts]]\njitter = 0.1\n", "cannot build jitter of node1"),
        ("[[hosts]]\nslow = {every_s = 9.0, for_s = 1.0, factor = 2.0}\n", "cannot build slow of node1"),
        ('[[hosts]]\ndevice = "a100"\ndevices = 2\n', "cannot build device of node1"),
        ("[[hosts]]\nmemory_gbyte_per_s = 9.0\n", "cannot build memory_gbyte_per_s of node1"),
        ("[[hosts]]\n[[hosts]]\nrack = 2\n", "cannot build several racks"),
        ("[[hosts]]\n[link]\nmbit_per_s = 4e5\n", "cannot build links of more than 100000 Mbit/s"),
        ("machine_cores = 999\n[[hosts]]\n", "cannot build machine_cores = 999 on a machine with"),
        ("[[hosts]]\ncores = 1024.0\n", "cannot build hosts of 1024 cores in total on the"),
    ],
)
def test_laboratory_refuses_what_it_cannot_build(tmp_path: Path, text: str, message: str) -> None:
    """All of these are clusters that the simulator takes."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert Description.load(path)
    with pytest.raises(ClusterError, match=message):
        buildable.load(path)


def test_refused_cluster_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "up", "--cluster", str(CLUSTERS / "k80.toml")]) == 2
    assert "hpctrain simulate" in capsys.readouterr().err


def test_missing_cluster_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "up", "--cluster", str(tmp_path / "none.toml")]) == 2
    assert "there is no cluster file" in capsys.readouterr().err


def test_lab_needs_root_and_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="needs root: sudo"):
        machine.check_machine()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(ClusterError, match="needs iproute2: apt-get install iproute2"):
        machine.check_machine()


def test_measurement_far_from_the_limit_is_wrong() -> None:
    assert LimitCheck("a to b", "Mbit/s", 100.0, 95.4).right
    assert str(LimitCheck("a to b", "Mbit/s", 100.0, 95.4)) == "a to b: 95.4 Mbit/s (limit 100)"
    assert str(LimitCheck("a to b", "Mbit/s", 100.0, 9.0)).endswith("WRONG")
    assert not LimitCheck("a to b", "Mbit/s", 100.0, 120.0).right
