"""Clusters described in TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description, HostGroup, HostLink, SlowSpells, nodes

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
        ("[[hosts]]\nspeed = 0.0\n", r"hosts\.0\.speed = 0\.0: must be a number, at least 0\.001"),
        ("[[hosts]]\nspead = 2.0\n", r"hosts\.0\.spead: unknown key \(did you mean speed\?\)"),
        ("[[hosts]]\n[link]\ngbit_per_s = 1.0\n", r"link\.gbit_per_s: unknown key.*; link has mbit_per_s, latency_ms"),
        ('[[hosts]]\n[link]\nmbit_per_s = "1 Gbit/s"\n', r'mbit_per_s = "1 Gbit/s": must be a number, at least 0\.1'),
        ("[[hosts]]\n[swich]\n", r"swich: unknown key \(did you mean switch\?\); a cluster has name, hosts"),
        ('[[hosts]]\ndevice = "a100"\n', "device .* and devices .* must be given together"),
        ("[[hosts]]\nslow = {every_s = 1.0, for_s = 2.0, factor = 2.0}\n", "for_s = 2 must be at most every_s = 1"),
        ("[[hosts]]\n[link]\nmbit_per_s = 0.0\n", r"link\.mbit_per_s = 0\.0: must be"),
        ("[[hosts]]\ncount = 4000\n[[hosts]]\ncount = 97\n", "4097 hosts; a cluster may have at most 4096"),
        ("hosts = ", "not valid TOML"),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        described(tmp_path, text)


def test_traits_of_a_group_are_those_of_its_hosts(tmp_path: Path) -> None:
    cluster = described(
        tmp_path,
        "[[hosts]]\ncount = 2\nspeed = 0.5\njitter = 0.1\nrack = 2\nmemory_gbyte_per_s = 9.5\n"
        'device = "a100"\ndevices = 4\nslow = {every_s = 60.0, for_s = 5.0, factor = 3.0}\n'
        "[[hosts]]\n[switch]\noversubscription = 4.0\n",
    )
    fast = cluster.each()[1]
    assert (fast.speed, fast.jitter, fast.rack, fast.memory_gbyte_per_s) == (0.5, 0.1, 2, 9.5)
    assert (fast.device, fast.devices) == ("a100", 4)
    assert fast.slow == SlowSpells(every_s=60.0, for_s=5.0, factor=3.0)
    assert cluster.summary() == (
        "mine: 3 hosts, 1000 Mbit/s, 4 a100 on 2 of them, speed 0.5 to 1, 2 racks, oversubscribed 4 to 1"
    )


def test_ranks_fill_host_after_host(tmp_path: Path) -> None:
    hosts = described(tmp_path, "[[hosts]]\nranks = 3\n[[hosts]]\ncount = 2\nranks = 2\n").each()
    assert nodes(hosts) == (0, 0, 0, 1, 1, 2, 2)
    assert nodes(hosts, 4) == (0, 0, 0, 1)
    with pytest.raises(ClusterError, match="-n 8: the cluster has places for 1 to 7 ranks"):
        nodes(hosts, 8)


def test_documentation_shows_a_valid_cluster_and_every_key(tmp_path: Path) -> None:
    text = (CLUSTERS.parent / "docs" / "clusters.md").read_text()
    assert len(described(tmp_path, text.split("```toml\n")[1].split("```")[0]).each()) == 16
    assert all(f"hosts.{key}`" in text for key in HostGroup.model_fields)
    assert all(f"link.{key}`" in text for key in HostLink.model_fields)
    assert all(f"`{path.stem}`" in text for path in CLUSTERS.glob("*.toml"))
