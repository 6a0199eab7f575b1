"""What a process knows about its launcher before MPI starts: pure functions of the environment."""

from __future__ import annotations

import pytest

from hpctrain.errors import ClusterError
from hpctrain.launcher.facts import LAUNCHERS, MARK, OPEN_MPI, launcher_of
from hpctrain.launcher.started import (
    check_singleton,
    has_own_terminal,
    has_rank,
    is_launched,
    launched_rank,
    launched_size,
    netmod_for,
    without_launcher,
)

MPICH, OPEN_MPI_LIBRARY = "MPICH Version: 4.3.0", "Open MPI v5.0.8"


@pytest.mark.parametrize(
    ("environment", "rank", "size", "launcher"),
    [
        ({}, 0, 1, ""),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, 3, 4, "Open MPI's mpirun"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 1, 2, "an MPICH-like mpiexec, or srun --mpi=pmi2"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}, 2, 8, "srun"),
        ({"PMIX_RANK": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 5, 8, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, 0, 1, ""),  # the batch script
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 0, 1, ""),
        ({"PMI_SIZE": "many", "PMI_RANK": "-"}, 0, 1, ""),
        ({"OMPI_COMM_WORLD_SIZE": ""}, 0, 1, ""),
    ],
)
def test_what_launchers_set(environment: dict[str, str], rank: int, size: int, launcher: str) -> None:
    assert launched_rank(environment) == rank
    assert launched_size(environment) == (size, launcher)
    check_singleton(max(2, size), MPICH, environment)  # MPI has several ranks: no error
    if size == 1:
        check_singleton(1, MPICH, environment)


@pytest.mark.parametrize(
    ("environment", "library", "cure"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, MPICH, "use the mpiexec that belongs to that library"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, MPICH, "use the mpiexec that belongs"),
        ({"PMI_SIZE": "4"}, OPEN_MPI_LIBRARY, "or, under srun, another --mpi"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, OPEN_MPI_LIBRARY, "--mpi=pmix for Open MPI"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, MPICH, "--mpi=pmi2 for MPICH"),
    ],
)
def test_processes_each_in_a_world_of_their_own(environment: dict[str, str], library: str, cure: str) -> None:
    with pytest.raises(ClusterError, match=cure) as caught:
        check_singleton(1, library, environment)
    assert "started 4 processes, but the MPI library" in str(caught.value)
    assert library in str(caught.value)


SRUN = {"SLURM_STEP_ID": "0", "PMI_FD": "11"}
BOTH = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH CC:  cc\0"
PYPI = BOTH + "MPICH Custom Information:\thttps://pypi.org/p/mpich/5.0.2/\0"


@pytest.mark.parametrize(("library", "environment"), [(BOTH, SRUN), (PYPI, {}), (PYPI, SRUN)])
def test_mpich_with_a_choice_uses_ofi_under_sruns_pmi2_or_from_pypi(library: str, environment: dict[str, str]) -> None:
    assert netmod_for(library, environment) == {"MPIR_CVAR_CH4_NETMOD": "ofi"}


@pytest.mark.parametrize(
    ("library", "environment"),
    [
        (BOTH, {}),
        (BOTH, {"PMI_FD": "11"}),
        (BOTH, {"SLURM_STEP_ID": "0"}),  # --mpi=none, pmix
        (BOTH, {**SRUN, "MPI_LOCALNRANKS": "2"}),  # its own mpiexec, inside a job
        (BOTH, {**SRUN, "MPIR_CVAR_CH4_NETMOD": "ucx"}),
        (PYPI, {"MPIR_CVAR_CH4_NETMOD": "ucx"}),
        (BOTH.replace("ucx ofi", "ucx"), SRUN),
        (BOTH.replace("ucx ofi", "ofi"), SRUN),
        (OPEN_MPI_LIBRARY, SRUN),
    ],
)
def test_otherwise_the_library_chooses_its_network(library: str, environment: dict[str, str]) -> None:
    assert netmod_for(library, environment) == {}


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD", "PMI", "PMIX", "SLURM"])
def test_rank_comes_from_the_launchers_variables(name: str) -> None:
    rank = {"SLURM": "SLURM_PROCID"}.get(name, f"{name}_RANK")
    assert has_rank({rank: "0"})
    assert not has_rank({"PATH": "/bin"})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", MARK])
def test_launched_process_is_recognised_even_alone(name: str) -> None:
    assert is_launched({name: "1"})
    assert not is_launched({"SLURM_JOB_ID": "7", "PATH": "/bin"})


def test_only_open_mpi_gives_each_rank_a_terminal() -> None:
    assert has_own_terminal({"OMPI_COMM_WORLD_RANK": "0"})
    assert not has_own_terminal({"PMI_RANK": "0", "SLURM_PROCID": "0"})


def test_launcher_variables_are_removed_and_user_settings_kept() -> None:
    from_launcher = dict.fromkeys(
        ("PMI_RANK", "PMI2_X", "PMIX_RANK", "HYDI_CONTROL_FD", "MPI_LOCALRANKID", "PALS_RANKID", "PRTE_LAUNCHED",
         "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_num_procs"), "1",
    )  # fmt: skip
    kept = dict.fromkeys(("PATH", "PRTE_ALLOW_RUN_AS_ROOT", "PMIX_MCA_gds", "HYDRA_LAUNCHER", "OMPI_MCA_btl"), "1")
    assert without_launcher({**from_launcher, **kept}) == kept


def test_every_kind_of_library_has_one_launcher() -> None:
    kinds = [launcher.kind for launcher in LAUNCHERS if launcher.kind]
    assert len(kinds) == len(set(kinds))
    assert launcher_of("openmpi") is OPEN_MPI
    assert launcher_of("other").options == ()
