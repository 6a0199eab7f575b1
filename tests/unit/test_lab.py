"""Clusters described in TOML; the hosts themselves are in tests/hosts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hpctrain.cli import main
from hpctrain.errors import ClusterError
from hpctrain.lab import machine
from hpctrain.lab.check import LimitCheck
from hpctrain.lab.description import Description, HostLink

CLUSTERS = Path(__file__).resolve().parents[2] / "clusters"


def described(folder: Path, text: str) -> Description:
    path = folder / "mine.toml"
    path.write_text(text)
    return Description.load(path)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.toml")), ids=lambda path: path.stem)
def test_ready_made_clusters_load(path: Path) -> None:
    assert Description.load(path).name == path.stem


def test_groups_become_hosts_and_the_link_is_inherited(tmp_path: Path) -> None:
    cluster = described(
        tmp_path,
        "[[hosts]]\ncount = 2\nranks = 3\n"
        "[[hosts]]\ncores = 0.25\nlink = {mbit_per_s = 10.0}\n"
        "[link]\nmbit_per_s = 100.0\n",
    )
    assert cluster.name == "mine"
    hosts = cluster.each()
    assert [(h.name, h.ranks, h.cores, h.link.mbit_per_s) for h in hosts] == [
        ("node1", 3, None, 100.0), ("node2", 3, None, 100.0), ("node3", 1, 0.25, 10.0),
    ]  # fmt: skip
    assert [host.address for host in hosts] == ["10.213.0.1", "10.213.0.2", "10.213.0.3"]
    assert cluster.summary() == "mine: 3 hosts, 10 to 100 Mbit/s, 0.25 cores on 1 of them"


def test_plain_form_is_the_same_cluster(tmp_path: Path) -> None:
    cluster = described(tmp_path, "[[hosts]]\n[link]\nlatency_ms = 2.0\n")
    assert Description.model_validate(cluster.plain()) == cluster
    assert cluster.link == HostLink(latency_ms=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mine.toml: hosts: is missing"),
        ("[[hosts]]\ncount = 0\n", r"hosts\.0\.count = 0: must be .*at least 1"),
        ("[[hosts]]\nspeed = 2.0\n", r"hosts\.0\.speed"),
        ("[[hosts]]\n[link]\nmbit_per_s = 0.0\n", r"link\.mbit_per_s = 0\.0: must be"),
        ("[[hosts]]\ncount = 40\n[[hosts]]\ncount = 40\n", "80 hosts; at most 64 fit on one machine"),
        ("hosts = ", "not valid TOML"),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        described(tmp_path, text)


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
