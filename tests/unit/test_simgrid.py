"""The network of flows against SimGrid: the same cluster, the same messages. Debian has it as python3-simgrid."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.comm.virtual import schedules
from hpctrain.comm.virtual.flows import FlowNetwork, MessageCosts
from hpctrain.comm.virtual.world import World
from hpctrain.hosts import Description, HostGroup, HostLink, HostSwitch

PYTHON = "/usr/bin/python3"  # the system's, for which distributions build SimGrid
SCRIPT = Path(__file__).parents[1] / "simgrid_times.py"
MOST = 0.001
Step = tuple[tuple[int, int] | None, int | None]

EQUAL = Description(hosts=[HostGroup(count=8)], link=HostLink(mbit_per_s=1000.0, latency_ms=0.1))
UNEQUAL = Description(
    hosts=[HostGroup(count=4), HostGroup(count=2, link=HostLink(mbit_per_s=100.0)), HostGroup(count=2)]
)
RACKS = Description(
    hosts=[HostGroup(count=4), HostGroup(count=4, rack=2)],
    link=HostLink(latency_ms=0.1),
    switch=HostSwitch(oversubscription=4.0),
)
# With whether messages are buffered. If not, there must be no latency: SimGrid's do not ask their receivers first.
CLUSTERS = {"equal": (EQUAL, True), "unequal": (UNEQUAL, False), "racks": (RACKS, True)}


@functools.cache
def has_simgrid() -> bool:
    try:
        done = subprocess.run([PYTHON, "-c", "import simgrid"], capture_output=True, timeout=30, check=False)
    except OSError:
        return False
    return done.returncode == 0


def platform(cluster: Description) -> str:
    """The cluster in SimGrid's XML: two links per host, and per rack if there are several."""
    hosts, lines = cluster.each(), []
    racks = {host.rack for host in hosts}
    links = {f"h{i}": (host.link.mbit_per_s, host.link.latency_ms) for i, host in enumerate(hosts)}
    for rack in racks if len(racks) > 1 else ():
        rate = sum(host.link.mbit_per_s for host in hosts if host.rack == rack) / cluster.switch.oversubscription
        links[f"r{rack}"] = (rate, 0.0)
    lines += [f'<host id="h{i}" speed="1Gf"/>' for i in range(len(hosts))]
    for name, (rate, latency) in links.items():
        lines.append(f'<link id="{name}-out" bandwidth="{rate}Mbps" latency="{latency}ms"/>')
        lines.append(f'<link id="{name}-in" bandwidth="{rate}Mbps" latency="0ms"/>')
    for a, here in enumerate(hosts):
        for b, there in enumerate(hosts):
            middle = [f"r{here.rack}-out", f"r{there.rack}-in"] if here.rack != there.rack else []
            passed = "".join(f'<link_ctn id="{name}"/>' for name in (f"h{a}-out", *middle, f"h{b}-in"))
            if a != b:
                lines.append(f'<route src="h{a}" dst="h{b}" symmetrical="NO">{passed}</route>')
    return (
        "<?xml version='1.0'?><!DOCTYPE platform SYSTEM \"https://simgrid.org/simgrid.dtd\">"
        f'<platform version="4.1"><zone id="all" routing="Full">{"".join(lines)}</zone></platform>'
    )


def in_simgrid(cluster: Description, buffered: bool, programs: list[list[Step]], folder: Path) -> list[float]:
    path = folder / "platform.xml"
    path.write_text(platform(cluster))
    command = [PYTHON, str(SCRIPT), str(path), *(["--buffered"] if buffered else [])]
    done = subprocess.run(
        command, input=json.dumps(programs), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    ends: list[float] = json.loads(done.stdout)
    return ends


def in_flows(cluster: Description, buffered: bool, programs: list[list[Step]]) -> list[float]:
    def body(comm: Any) -> float:
        for send, source in programs[comm.rank]:
            requests = []
            if source is not None:
                requests.append(comm.start_recv(np.zeros(10**8, np.uint8), source, 2))
            if send is not None:
                requests.append(comm.start_send(np.zeros(send[1], np.uint8), send[0], 2))
            comm.wait_all(requests)
        return comm.now() / 1e9

    network = FlowNetwork(cluster, MessageCosts(latency=0, eager_limit=2**40 if buffered else -1))
    return World(len(programs), range(len(programs)), network).run(body)


def collective(name: str, length: int) -> list[list[Step]]:
    """The steps of each of eight ranks."""
    programs: list[list[Step]] = [[] for _ in range(8)]
    for source, dest, low, high, _ in schedules.ALL_REDUCE[name](8, length):
        sends: dict[int, Any] = {}
        takes: dict[int, int] = {}
        for a, b, nbytes in zip(source.tolist(), dest.tolist(), (high - low).tolist(), strict=True):
            sends[a], takes[b] = (b, nbytes), a
        for rank in sorted({*sends, *takes}):
            programs[rank].append((sends.get(rank), takes.get(rank)))
    return programs


def at_once(*messages: tuple[int, int, int]) -> list[list[Step]]:
    """Ranks that send or receive one message each."""
    programs: list[list[Step]] = [[] for _ in range(8)]
    for source, dest, nbytes in messages:
        programs[source].append(((dest, nbytes), None))
        programs[dest].append((None, source))
    return programs


PROGRAMS = {
    "ping-pong": [[((1, 100), None), (None, 1)] * 5, [(None, 0), ((0, 100), None)] * 5],
    "one message": at_once((0, 1, 10_000_000)),
    "to a slow host": at_once((0, 4, 1_000_000)),
    "between racks": at_once((0, 4, 10_000_000), (1, 5, 10_000_000), (2, 6, 5_000_000)),
    "ring": collective("ring", 8_000_000),
    "halving and doubling": collective("halving_doubling", 8_000_000),
    "tree": collective("tree", 1_000_000),
    "tree of short messages": collective("tree", 1_000),
}


@pytest.mark.skipif(not has_simgrid(), reason=f"{PYTHON} cannot import simgrid (apt-get install python3-simgrid)")
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_times_agree_with_simgrid(cluster: str, program: str, tmp_path: Path) -> None:
    (described, buffered), programs = CLUSTERS[cluster], PROGRAMS[program]
    expected = in_simgrid(described, buffered, programs, tmp_path)
    assert max(expected) > 0
    assert in_flows(described, buffered, programs) == pytest.approx(expected, rel=MOST, abs=1e-6)
