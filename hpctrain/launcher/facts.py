"""All facts about launchers in one table, read by all code that deals with a launcher.

Imports nothing from this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["mpich", "openmpi", "intel", "other"]

# Environment variables that `hpctrain run` sets. The first marks all processes of one launch. The second names the file
# that a rank touches while `hpctrain run` should wait for it. While a rank is in the middle of a run, a file with that
# name and the rank's number as suffix exists.
MARK = "HPCTRAIN_LAUNCH"
STOPPING = "HPCTRAIN_STOPPING"


@dataclass(frozen=True)
class Words:
    """Regular expressions for what a launcher prints when ranks fail. Empty: it prints no such thing.

    `who` has the group host and, where the launcher prints them, rank and pid; `signal` has the group number.
    """

    block: str = ""  # the first line, after a rule, of a message of several lines
    lines: tuple[str, ...] = ()  # a message of a single line
    who: str = ""  # which rank ended, within a block
    left: str = ""  # that it exited by itself in the middle of a run, within a block
    signal: str = ""  # the signal that ended it, in the block or a line that follows
    codes: str = ""  # a list of how all ranks ended: the group codes for the first host, the group more for the rest


@dataclass(frozen=True)
class Launcher:
    """A launcher of ranks. A field is empty if the launcher has no such thing, or no code needs it."""

    name: str  # shown to users
    # The MPI library that the launcher belongs to. None: it serves several libraries, or none of those in `Kind`.
    kind: Kind | None = None
    vendor: str = ""  # the library's name for itself (MPI.get_vendor)
    version: str = ""  # a regular expression for the output of `mpiexec --version`

    # Names of variables in a rank's environment.
    rank: str = ""
    size: str = ""
    local_rank: str = ""  # among the ranks of its node
    local_size: str = ""
    connection: str = ""  # the file descriptor of its connection to the launcher
    private: str = ""  # a regular expression for variables that apply to these ranks only, not to ranks that they start
    terminal: bool = False  # each rank's output is a terminal, whatever the launcher's own output is

    parents: frozenset[str] = frozenset()  # possible names of its ranks' parent process

    # How `hpctrain run` starts the launcher.
    options: tuple[str, ...] = ()
    prints_codes: tuple[str, ...] = ()  # options that make it print how each rank ended
    srun: str = "pmi2"  # what `srun --mpi=` needs for this library
    defaults: Mapping[str, str] = field(default_factory=dict)  # variables for its ranks
    root: Mapping[str, str] = field(default_factory=dict)  # variables that let root start ranks
    wheel: Mapping[str, str] = field(default_factory=dict)  # variables for a library installed by pip
    words: Words = Words()


OPEN_MPI_IDLE = "OMPI_MCA_mpi_yield_when_idle"  # whether waiting ranks yield their core to others
MPICH_NETMOD = "MPIR_CVAR_CH4_NETMOD"  # which network layer MPICH uses

OPEN_MPI = Launcher(
    name="Open MPI's mpirun",
    kind="openmpi",
    vendor="Open MPI",
    version=r"Open MPI|OpenRTE|PRTE|prterun",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    private=(
        r"OMPI_(COMM_WORLD|WORLD|UNIVERSE|FILE|ARGV|COMMAND|NUM_APP)|OMPI_MCA_(initial_wdir|num_procs)"
        r"|PRTE_(LAUNCHED|SHARED_FS)"
    ),
    terminal=True,
    parents=frozenset({"mpirun", "mpiexec", "prterun", "prte", "prted"}),
    # By default it counts cores and binds ranks to them; torch's threads need the rank's whole share.
    options=("--oversubscribe", "--bind-to", "none"),
    srun="pmix",
    # Without this, a 4 KiB all-reduce with more ranks than cores takes 12 ms instead of 33 us.
    defaults={OPEN_MPI_IDLE: "1"},
    root={"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    # The wheel's UCX is slow to start (1 s) and does not work everywhere; a site's own library is set up for it.
    wheel={"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_osc": "^ucx,rdma"},
    words=Words(
        block=r"prterun (detected|noticed|has exited)|MPI_ABORT was invoked",
        lines=(r"\[\S+:\d+\] PMIX ERROR: PMIX_ERR_UNREACH",),
        who=r"process rank (?P<rank>\d+) with PID (?P<pid>\d+) on node (?P<host>\S+)",
        left=r"exiting\s+improperly",
        signal=r"exited on\s+signal (?P<number>\d+)",
    ),
)
# Hydra's mpiexec, which starts the ranks of a node through a proxy.
MPICH = Launcher(
    name="an MPICH-like mpiexec, or srun --mpi=pmi2",
    kind="mpich",
    vendor="MPICH",
    version="HYDRA",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
    connection="PMI_FD",
    private=r"PMI2?_|MPI_LOCAL(RANKID|NRANKS)|HYDI_",
    parents=frozenset({"hydra_pmi_proxy"}),
    prints_codes=("-print-all-exitcodes",),
    words=Words(
        block=r"=\s+BAD TERMINATION OF ONE OF YOUR APPL",
        lines=(
            r"\[mpiexec@\S+\] (Sending Ctrl-C|Press Ctrl-C)",
            r"Abort\(\d+\) on node \d+ \(rank",
            r"YOUR APPLICATION TERMINATED WITH THE EXIT STRING",
            r"This typically refers to a problem with your appl",
            r"Please see the FAQ page for debugging",
        ),
        who=r"PID \d+ RUNNING AT (?P<host>\S+)",  # this PID may belong to a rank that hydra itself has killed
        signal=r"THE EXIT STRING: .*\(signal (?P<number>\d+)\)",
        codes=r"^\[mpiexec@\S+\] Exit codes: \[[^]]+\] (?P<codes>[-\d,]+)(?P<more>.*)",
    ),
)
INTEL = replace(MPICH, kind="intel", vendor="Intel MPI", version=r"Intel\(R\) MPI", prints_codes=())
PMIX = Launcher(name="a launcher that speaks PMIx", rank="PMIX_RANK", private=r"PMIX_(?!MCA_)")
PALS = Launcher(name="Cray's PALS", private="PALS_")
SRUN = Launcher(name="srun", rank="SLURM_PROCID", size="SLURM_STEP_NUM_TASKS")

# In order of precedence: a rank of an mpirun started by srun belongs to mpirun; Intel's mpiexec also prints HYDRA.
LAUNCHERS = (OPEN_MPI, INTEL, MPICH, PMIX, PALS, SRUN)
OTHER = Launcher(name="an unknown launcher", kind="other")


def launcher_of(kind: Kind) -> Launcher:
    """The launcher that belongs to an MPI library."""
    return next((launcher for launcher in LAUNCHERS if launcher.kind == kind), OTHER)


@dataclass(frozen=True)
class BatchSystem:
    """Names of the variables by which a batch system describes the job that a process belongs to."""

    prefix: str  # of all its variables
    job: str
    array_job: str  # the id that all jobs of an array share
    array_task: str
    cluster: str
    restarts: str  # how often the job was requeued
    step: str  # set if srun has started the process
    tasks: str
    nodes: str
    cores_per_task: str
    reported: tuple[str, ...]  # what `hpctrain doctor` shows


SLURM = BatchSystem(
    prefix="SLURM_",
    job="SLURM_JOB_ID",
    array_job="SLURM_ARRAY_JOB_ID",
    array_task="SLURM_ARRAY_TASK_ID",
    cluster="SLURM_CLUSTER_NAME",
    restarts="SLURM_RESTART_COUNT",
    step="SLURM_STEP_ID",
    tasks="SLURM_NTASKS",
    nodes="SLURM_JOB_NUM_NODES",
    cores_per_task="SLURM_CPUS_PER_TASK",
    reported=(
        "SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE",
        "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_GPUS_ON_NODE",
        "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_MPI_TYPE", "SLURM_CPU_BIND", "SLURM_RESTART_COUNT",
    ),
)  # fmt: skip
SLURM_FEDERATED = 2**26  # Slurm job ids from here on contain the number of their cluster

# Beginnings of the names of files that MPI libraries and launchers leave behind: in shared memory, and hydra's in the
# temporary folder.
SHARED_MEMORY = r"mpich_(shm|shar)_|sm_segment\.|vader_segment\.|psm[23]?_shm|ucx_shm_|Intel_MPI_"
HYDRA_FILE = "hydra_hwloc_xmlfile_"
PRTE_FOLDER = "ompi."  # followed by the PID of the launcher: its session folder
