"""Starts MPI ranks on the hosts of a lab, over TCP."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from hpctrain.errors import ClusterError
from hpctrain.hosts import Host, nodes
from hpctrain.lab.machine import CARD, HOME, on_host
from hpctrain.launcher import find_mpiexec, rank_environment
from hpctrain.launcher.mpiexec import Mpi

# All hosts share this machine's memory; without these, MPI would find that out and use it.
MPICH_OVER_TCP = {
    "FI_PROVIDER": "tcp", "FI_TCP_IFACE": CARD,
    "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": CARD,  # where MPIR_CVAR_CH4_NETMOD=ucx
}  # fmt: skip
OPEN_MPI_OVER_TCP = ("--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm", "--mca", "btl_tcp_if_include", CARD)


def run(
    hosts: Sequence[Host],
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    count: int | None = None,
) -> int:
    """Start `command` on ranks of these hosts, as many on each as it has, or `count` in total, filling host after host.
    Forwards output; returns the exit status. Raises ClusterError if there are not enough places."""
    count = len(nodes(hosts, count))
    mpi = find_mpiexec()
    variables = rank_environment(mpi.library, {**os.environ, **(environment or {})})
    argv = _mpich(mpi, hosts, count) if mpi.library.kind == "mpich" else _open_mpi(mpi, hosts, count, variables)
    if mpi.library.kind == "mpich":
        variables = {**MPICH_OVER_TCP, **variables}
    return subprocess.run(on_host(hosts[0], [*argv, *command]), env=variables, check=False).returncode


def _mpich(mpi: Mpi, hosts: Sequence[Host], count: int) -> list[str]:
    names = ",".join(f"{host.name}:{host.ranks}" for host in hosts)
    return [mpi.path, "-launcher", "ssh", "-launcher-exec", str(HOME / "agent"), "-hosts", names, "-n", str(count)]


def _open_mpi(mpi: Mpi, hosts: Sequence[Host], count: int, variables: Mapping[str, str]) -> list[str]:
    if mpi.library.kind != "openmpi":
        raise ClusterError(f"hpctrain lab starts ranks with MPICH or Open MPI, but mpi4py loads {mpi.library.version}")
    names = ",".join(f"{host.name}:{host.ranks}" for host in hosts)
    passed = [part for name in sorted(variables) if _passed(name) for part in ("-x", name)]
    agent = ("--prtemca", "plm_ssh_agent", str(HOME / "agent"))
    return [*mpi.command(count), *agent, "--host", names, *OPEN_MPI_OVER_TCP, *passed]


def _passed(name: str) -> bool:
    """Whether Open MPI's launcher must be asked to pass this variable to the other hosts."""
    return name.startswith(("HPCTRAIN_", "OMP_", "PYTHON", "GLIBC_", "OMPI_MCA_mpi", "TMPDIR", "PATH"))

