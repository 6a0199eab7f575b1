"""Measures the hosts of a lab: each link with iperf3, and each share of the processors with a busy loop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description, Host
from hpctrain.lab.machine import on_host

SECONDS = 2.0  # of each measurement
LOW, HIGH = 0.88, 1.05  # what a limit may turn out as: TCP's headers take 4 to 6 %
BUSY = f"""
import time
began, used = time.monotonic(), time.process_time()
while time.monotonic() - began < {SECONDS}:
    pass
print((time.process_time() - used) / (time.monotonic() - began))
"""


@dataclass(frozen=True)
class LimitCheck:
    """One measurement against what the cluster's file says."""

    what: str
    unit: str
    wanted: float
    found: float

    @property
    def right(self) -> bool:
        """Whether it is close enough."""
        return LOW * self.wanted <= self.found <= HIGH * self.wanted

    def __str__(self) -> str:
        verdict = "" if self.right else "  WRONG"
        return f"{self.what}: {self.found:.3g} {self.unit} (limit {self.wanted:g}){verdict}"


def check(cluster: Description) -> Iterator[LimitCheck]:
    """Measure every link, in both directions, and every share. Raises ClusterError if iperf3 is missing or fails."""
    if shutil.which("iperf3") is None:
        raise ClusterError("hpctrain lab check needs iperf3: apt-get install iperf3")
    first, *others = cluster.each()
    for host in others:
        wanted = min(first.link.mbit_per_s, host.link.mbit_per_s)
        yield LimitCheck(f"{first.name} to {host.name}", "Mbit/s", wanted, _speed(first, host, ()))
        yield LimitCheck(f"{host.name} to {first.name}", "Mbit/s", wanted, _speed(first, host, ("--reverse",)))
    for host in cluster.each():
        if host.cores is not None:
            yield LimitCheck(f"{host.name}, busy loops", "cores", host.cores, _share(host, ceil(host.cores)))


def _speed(first: Host, other: Host, more: tuple[str, ...]) -> float:
    """Mbit/s from `first` to `other`, or the reverse."""
    with subprocess.Popen(
        on_host(other, ["iperf3", "--server", "--one-off"]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            command = ["iperf3", "--client", other.address, "--time", f"{SECONDS:g}", "--json", *more]
            deadline = time.monotonic() + 10.0
            while True:
                done = subprocess.run(
                    on_host(first, command), capture_output=True, text=True, timeout=60, check=False
                )
                found = json.loads(done.stdout or "{}")
                if "error" not in found and found:
                    return float(found["end"]["sum_received"]["bits_per_second"]) / 1e6
                if time.monotonic() > deadline:  # until then, the server may not listen yet
                    why = found.get("error", done.stderr.strip())
                    raise ClusterError(f"iperf3 from {first.name} to {other.name} failed: {why}")
                time.sleep(0.1)
        finally:
            server.kill()


def _share(host: Host, loops: int) -> float:
    """Cores that this many busy loops on the host get together."""
    argv = on_host(host, [sys.executable, "-c", BUSY])
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(loops)]
    ended = [process.communicate(timeout=60) for process in started]
    if any(process.returncode for process in started):
        raise ClusterError(f"a busy loop on {host.name} failed: {ended[0][1].strip()}")
    return sum(float(out) for out, _ in ended)
