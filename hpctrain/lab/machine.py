"""Builds the hosts of a cluster from network namespaces and control groups, finds them again, and removes them.

All names begin with PREFIX, so that `remove` finds what a killed process has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description, Host

PREFIX = "hpclab-"
SWITCH = f"{PREFIX}switch"
HOME = Path("/run/hpctrain-lab")
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec` puts their contents in place of those of /etc
CARD = "e0"  # a host's network card
BURST_MS = 0.6  # of data that a link passes at once after a pause: at 1 Gbit/s, one of TCP's large packets (64 KiB)
PACKETS = 3200  # bytes, at least: two packets of the wire
QUEUE_MS = 50  # of data that waits before a link drops packets, but at least as much as follows
CARD_QUEUE, PORT_QUEUE = 1_500_000, 256_000  # bytes: a card's thousand packets, a port of an office switch
PERIOD_US = 10_000  # over which a host's share of the processors is counted
SECONDS = 30.0  # for any command
IPV4 = Path("/proc/sys/net/ipv4")
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
# Stands in for ssh: runs a command on a host. MPI's launchers pass options first, then the host, then words for a shell
# at the other end.
AGENT = """#!/bin/sh
while case "$1" in -*) true ;; *) false ;; esac; do shift; done
host=$1; shift
group="{groups}/{prefix}${{host#node}}"
if [ -d "$group" ]; then echo $$ > "$group/{tasks}" || exit 1; fi
exec ip netns exec "{prefix}${{host#node}}" unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
"""


def check_machine() -> None:
    """Raise ClusterError if this machine cannot have a lab."""
    if os.geteuid() != 0:
        raise ClusterError(
            'hpctrain lab makes network namespaces, which needs root: sudo "$(command -v hpctrain)" lab ...'
        )
    absent = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if absent:
        raise ClusterError(f"hpctrain lab needs {' and '.join(absent)}: apt-get install {' '.join(absent)}")


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the lock that lets one process at a time build, use or remove hosts. Raises ClusterError if it is taken."""
    check_machine()
    with open(HOME.with_suffix(".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ClusterError(
                f"another hpctrain lab is busy on this machine (PID {file.read().strip() or 'unknown'}); wait until it "
                "has ended, or end it with `kill`"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        with _ended_by_signals():
            yield


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process like Ctrl-C, so that the hosts are removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def standing() -> Description | None:
    """The cluster that `keep` was called for and whose hosts exist; None if there is none, or only remains of one."""
    try:
        found = Description.model_validate(json.loads((HOME / "kept.json").read_text()))
    except (OSError, ValueError):
        return None
    return found if {f"{PREFIX}{host.number}" for host in found.each()} <= set(_spaces()) else None


def keep(cluster: Description) -> None:
    """The hosts that `build` has made are to stay for other processes."""
    (HOME / "kept.json").write_text(json.dumps(cluster.plain()))


def build(cluster: Description) -> None:
    """Create the hosts. Removes them again, and raises ClusterError, if a step fails."""
    with contextlib.ExitStack() as undo:
        undo.callback(remove)
        HOME.mkdir(parents=True, exist_ok=True)
        _ip("netns", "add", SWITCH)
        _in(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        _in(SWITCH, "ip", "link", "set", "bridge", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in cluster.each())
        for host in cluster.each():
            _add(host, names)
        agent, groups = HOME / "agent", HOME / "groups"
        groups.mkdir()
        folder, tasks = next(iter(_group_folders()), (None, ""))
        if folder is not None:  # `ip netns exec` hides /sys from what runs on a host
            _run(("mount", "--bind", str(folder), str(groups)))
        agent.write_text(AGENT.format(groups=groups, tasks=tasks, prefix=PREFIX))
        agent.chmod(0o755)
        undo.pop_all()


def _add(host: Host, names: str) -> None:
    space = f"{PREFIX}{host.number}"
    files = HOSTS_FILES / space
    files.mkdir(parents=True)
    (files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    _ip("netns", "add", space)
    port = f"p{host.number}"
    _ip("link", "add", CARD, "netns", space, "type", "veth", "peer", "name", port, "netns", SWITCH)
    _in(space, "ip", "link", "set", "lo", "up")
    _in(space, "ip", "address", "add", f"{host.address}/24", "dev", CARD)
    _in(space, "ip", "link", "set", CARD, "up")
    _control_congestion(space)
    _in(SWITCH, "ip", "link", "set", port, "master", "bridge", "up")
    _limit_link(host, space, port)
    if host.cores is not None:
        _limit_cores(space, host.cores)


def _control_congestion(space: str) -> None:
    """Let TCP do what it does by default on Linux, whatever this machine is set to. BBR, for example, slows down now
    and then to see how fast an idle link is."""
    with contextlib.suppress(OSError, ClusterError):  # where it cannot be set, it stays
        allowed = (IPV4 / "tcp_allowed_congestion_control").read_text().split()
        usual = next(name for name in ("cubic", "reno", *allowed) if name in allowed)
        _in(space, "sh", "-c", f"echo {usual} > {IPV4 / 'tcp_congestion_control'}")


def _limit_link(host: Host, space: str, port: str) -> None:
    """Limit both directions: what the host sends, and what the switch sends to it."""
    rate = host.link.mbit_per_s * 1e6
    burst = max(int(rate / 8 * BURST_MS / 1000), PACKETS)
    limit = ("tbf", "rate", f"{rate:.0f}bit", "burst", f"{burst}", "limit")
    for where, card, queue in ((space, CARD, CARD_QUEUE), (SWITCH, port, PORT_QUEUE)):
        waits = max(int(rate / 8 * QUEUE_MS / 1000), queue)
        _in(where, "tc", "qdisc", "add", "dev", card, "root", "handle", "1:", *limit, f"{waits}")
    if host.link.latency_ms:
        packets = max(100, int(rate / 8 / 1500 * (host.link.latency_ms + QUEUE_MS) / 1000))  # on the way, or waiting
        delay = ("netem", "delay", f"{host.link.latency_ms}ms", "limit", f"{packets}")
        try:
            _in(space, "tc", "qdisc", "add", "dev", CARD, "parent", "1:1", "handle", "2:", *delay)
        except ClusterError:
            raise ClusterError(
                f"latency_ms = {host.link.latency_ms:g}: this kernel cannot delay packets (it has no sch_netem); leave "
                "the key out, or use another kernel"
            ) from None


# -- processors ------------------------------------------------------------------------------------------------
def _group_folders() -> list[tuple[Path, str]]:
    """(folder of processor control groups, name of a group's file for processes): version 1, or else 2."""
    old, new = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    if (old / "cpu.cfs_quota_us").exists():
        return [(old, "tasks")]
    return [(new, "cgroup.procs")] if (new / "cgroup.controllers").exists() else []


def _limit_cores(space: str, cores: float) -> None:
    if not _group_folders():
        raise ClusterError("hosts cannot get shares of the processors here: there are no control groups for them")
    folder, tasks = _group_folders()[0]
    group, quota = folder / space, int(cores * PERIOD_US)
    try:
        if tasks == "tasks":
            group.mkdir()
            (group / "cpu.cfs_period_us").write_text(f"{PERIOD_US}")
            (group / "cpu.cfs_quota_us").write_text(f"{quota}")
        else:
            (folder / "cgroup.subtree_control").write_text("+cpu")
            group.mkdir()
            (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
    except OSError as error:
        raise ClusterError(f"{group}: a host's share of the processors cannot be set ({error.strerror})") from None


# -- taking down -----------------------------------------------------------------------------------------------
def remove() -> list[str]:
    """End all processes on all hosts, and remove the hosts and everything else. Returns what was found, as phrases."""
    spaces = _spaces()
    ended = _end_processes(spaces)
    for space in spaces:
        _ip("netns", "delete", space)
    if os.path.ismount(HOME / "groups"):
        _run(("umount", "--lazy", str(HOME / "groups")))
    groups = [group for folder, _ in _group_folders() for group in folder.glob(f"{PREFIX}*")]
    for group in groups:
        _remove_group(group)
    files = list(HOSTS_FILES.glob(f"{PREFIX}*"))
    for each in [*files, HOME]:
        shutil.rmtree(each, ignore_errors=True)
    hosts = [space for space in spaces if space != SWITCH]
    found = {"host": len(hosts), "process": ended, "processor group": len(groups)}
    return [f"{count} {what}{'es' * (what == 'process' and count > 1) or 's' * (count > 1)}" for what, count in
            found.items() if count]  # fmt: skip


def _spaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=SECONDS, check=False)
    names = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    return [name for name in names if name.startswith(PREFIX)]


def _end_processes(spaces: Sequence[str]) -> int:
    """Kill the processes on the hosts until there are none; returns how many there were."""
    found: set[int] = set()
    deadline = time.monotonic() + SECONDS
    while now := {pid for space in spaces for pid in _pids(space)}:
        found |= now
        for pid in now:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {sorted(now)} on the hosts of the lab cannot be ended")
        time.sleep(0.05)
    return len(found)


def _pids(space: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=SECONDS, check=False)
    return [int(word) for word in done.stdout.split()]


def _remove_group(group: Path) -> None:
    """Its processes may take a moment to be gone."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"{group} cannot be removed ({error.strerror})") from None
            time.sleep(0.05)


# -- commands --------------------------------------------------------------------------------------------------
def on_host(host: Host, command: Sequence[str]) -> list[str]:
    """The arguments that run a command on a host, as part of its share of the processors."""
    return [str(HOME / "agent"), host.name, shlex.join(command)]


def bytes_sent(host: Host) -> int:
    """What the host has sent over its link so far, in bytes."""
    return int(_in(f"{PREFIX}{host.number}", "cat", f"/sys/class/net/{CARD}/statistics/tx_bytes"))


def _ip(*arguments: str) -> str:
    return _run(("ip", *arguments))


def _in(space: str, *command: str) -> str:
    return _run(("ip", "netns", "exec", space, *command))


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
