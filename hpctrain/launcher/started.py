"""What a process knows about its launcher before MPI starts. Pure functions of the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpctrain.errors import ClusterError
from hpctrain.launcher.facts import LAUNCHERS, MARK, MPICH, MPICH_NETMOD, OPEN_MPI, SLURM, SRUN

PRIVATE = re.compile("|".join(launcher.private for launcher in LAUNCHERS if launcher.private))
WHEEL = "pypi.org/p/mpich"  # in the version string of PyPI's MPICH


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, as far as is known before MPI starts; else 0."""
    for launcher in LAUNCHERS:
        if environment.get(launcher.rank, "").isdigit():
            return int(environment[launcher.rank])
    return 0


def launched_size(environment: Mapping[str, str]) -> tuple[int, str]:
    """(number of ranks the launcher started, the launcher's name); (1, "") if it did not start several."""
    for launcher in LAUNCHERS:
        if environment.get(launcher.size, "").isdigit() and int(environment[launcher.size]) > 1:
            return int(environment[launcher.size]), launcher.name
    return 1, ""


def has_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher gave this process a rank."""
    return any(launcher.rank in environment for launcher in LAUNCHERS)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher, or `hpctrain run`, started this process, alone or with others."""
    return MARK in environment or any(launcher.size in environment for launcher in LAUNCHERS)


def has_own_terminal(environment: Mapping[str, str]) -> bool:
    """Whether the launcher gave this rank its own terminal, which does not show where output ends up."""
    return any(launcher.terminal and launcher.rank in environment for launcher in LAUNCHERS)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without this process's own launcher variables: for processes that are not its ranks."""
    return {key: value for key, value in environment.items() if not PRIVATE.match(key)}


def check_singleton(size: int, library: str, environment: Mapping[str, str]) -> None:
    """Raise ClusterError if MPI reports one process while the launcher started several."""
    launched, launcher = launched_size(environment)
    if size > 1 or launched == 1:
        return
    if OPEN_MPI.size in environment and OPEN_MPI.vendor not in library:
        cure = "use the mpiexec that belongs to that library (`hpctrain run` finds it)"
    elif launcher == SRUN.name:
        cure = f"pass srun --mpi={MPICH.srun} for MPICH, --mpi={OPEN_MPI.srun} for Open MPI"
    else:
        cure = "use the mpiexec that belongs to that library (`hpctrain run` finds it), or, under srun, another --mpi"
    raise ClusterError(
        f"{launcher} started {launched} processes, but the MPI library that mpi4py loads ({library}) sees each of them "
        f"as a single process: launcher and library do not match; {cure}"
    )


def netmod_for(library: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which MPICH must start where it can choose between UCX and OFI and the user has not chosen.

    `library`: MPICH's version string. OFI is chosen in two cases:

    - `srun --mpi=pmi2`: Slurm's plug-in reads a PMI request in one piece of at most 1024 bytes. What ranks publish
      there for UCX is sometimes longer, by chance, and then all of them wait forever; for OFI it is always short.
    - PyPI's wheel. Over TCP, a rank that uses its UCX accepts a long message only after all that it is sending to the
      same rank, so the two directions of a link take turns.
    """
    device = next((line for line in library.splitlines() if line.startswith("MPICH Device")), "")
    by_srun = {SLURM.step, MPICH.connection} <= environment.keys() and MPICH.local_size not in environment
    choice = "ucx" in device and "ofi" in device and MPICH_NETMOD not in environment
    return {MPICH_NETMOD: "ofi"} if choice and (by_srun or WHEEL in library) else {}
