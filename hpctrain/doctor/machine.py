"""What a process sees of its node, its launcher and the file system. No function here communicates with other ranks."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from hpctrain import __version__, launcher
from hpctrain.cluster import threads_for
from hpctrain.doctor.facts import FolderFacts, MpiFacts, NodeFacts, RankFacts
from hpctrain.errors import ClusterError, HpctrainError
from hpctrain.launcher.facts import MPICH_NETMOD, OPEN_MPI, OPEN_MPI_IDLE, SHARED_MEMORY, SLURM
from hpctrain.launcher.started import has_rank, launched_size

NETWORK_TYPES = frozenset({
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "smbfs", "glusterfs", "afs", "panfs", "pvfs2",
    "orangefs", "9p", "wekafs", "quobyte", "acfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.beegfs",
    "fuse.juicefs", "fuse.dfuse", "fuse.s3fs", "fuse.gcsfuse",
})  # fmt: skip
PACKAGES = ("torch", "mpi4py", "numpy", "h5py", "cupy-cuda12x", "cupy-cuda13x")
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES", "HDF5_USE_FILE_LOCKING", OPEN_MPI_IDLE, "UCX_TLS",
    "UCX_NET_DEVICES", "I_MPI_OFFLOAD", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "UCX_IB_FORK_INIT",
    MPICH_NETMOD,
)  # fmt: skip
TRIAL = """
from mpi4py import MPI
try:
    from hpctrain.doctor.machine import remove_segments
except ImportError:  # found by a path that this child does not know
    pass
else:
    remove_segments()
"""
UNLIMITED = 2**60  # bytes: version 1 of control groups reports a larger value if there is no limit


# -- MPI and its launchers, before MPI starts ------------------------------------------------------------------
def look_at_launchers(environment: Mapping[str, str]) -> MpiFacts:
    """The library that mpi4py loads and the launchers found, all determined in child processes."""
    launched, by = launched_size(environment)
    path = shutil.which("mpiexec", path=environment.get("PATH"))
    kind, major = launcher.launcher_kind(path) if path else ("", "")
    try:
        library = launcher.find_library()
    except ClusterError as error:
        return MpiFacts(launched=launched, launcher=by, mpiexec=path, mpiexec_kind=kind, troubles=[str(error)])
    runs_with, runs_not = None, None
    try:
        runs_with = launcher.find_mpiexec().path
    except ClusterError as error:
        runs_not = str(error)
    wrong = launcher_mismatch(library, environment)
    return MpiFacts(
        library=library.version.strip("\0 "), kind=library.kind, launched=launched, launcher=by, mpiexec=path,
        mpiexec_kind=kind, belongs=library.fits(kind, major), runs_with=runs_with, runs_not=runs_not,
        srun_needs=library.srun, troubles=[wrong] if wrong is not None else [],
    )  # fmt: skip


def launcher_mismatch(library: launcher.Library, environment: Mapping[str, str]) -> str | None:
    """A sentence if MPI_Init would end this process, because the library lacks its launcher's protocol; else None."""
    if OPEN_MPI.size not in environment or library.kind == OPEN_MPI.kind:
        return None
    return (
        f"{OPEN_MPI.name} started this process, but mpi4py loads another MPI library ({library.version}), which cannot "
        "start under it; use the mpiexec that belongs to that library (`hpctrain run` finds it)"
    )


def why_mpi_does_not_start(environment: Mapping[str, str], seconds: float = 30.0) -> str | None:
    """A sentence on why a process without a launcher cannot start MPI, or None; tested in a child, which may die."""
    if has_rank(environment):
        return None  # only one process may connect to the launcher as a given rank
    argv = [sys.executable, "-c", TRIAL]
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"MPI_Init of a single process did not return within {seconds:.0f} s; check the network settings"
    if done.returncode == 0:
        return None
    how = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return f"MPI cannot be started in a single process ({how}); install another MPI or load the cluster's module"


def remove_segments() -> None:
    """Remove the files in /dev/shm of a process that is alone in its MPI job: Open MPI 5 leaves them (16 MiB).

    Mapped memory stays usable until the process ends.
    """
    for path in set(re.findall(r"(/dev/shm/\S+)", _read(Path("/proc/self/maps")))):
        if re.match(SHARED_MEMORY, Path(path).name):
            Path(path).unlink(missing_ok=True)


# -- a rank ----------------------------------------------------------------------------------------------------
def look_at_rank(
    rank: int, node: int, own: float, library: str, environment: Mapping[str, str], threads: int | str
) -> RankFacts:
    """The facts of this process. `own`: its number of cores; `threads`: the job's setting. Imports torch."""
    cores = sorted(os.sched_getaffinity(0))
    gpus, why, cuda, trouble = _look_at_torch()
    return RankFacts(
        rank=rank, node=node, host=socket.gethostname(), cores=cores,
        threads=threads_for(own, threads), gpus=gpus, gpu_trouble=why, torch_cuda=cuda,
        torch_trouble=trouble, versions=versions(library),
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )  # fmt: skip


def _look_at_torch() -> tuple[int, str | None, str | None, str | None]:
    try:
        import torch

        from hpctrain.comm.device.gpu import usable_gpus

        return (*usable_gpus(), torch.version.cuda, None)
    except Exception as error:  # a broken installation may raise anything
        return 0, None, None, f"torch cannot be imported ({type(error).__name__}: {error})"


def versions(library: str) -> dict[str, str]:
    """Versions that must match on all ranks, with a checksum of hpctrain's files: checkouts may share a version."""
    found = {"hpctrain": f"{__version__} ({_checksum()})", "Python": platform.python_version(), "MPI": library}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _checksum() -> str:
    home, value = Path(__file__).resolve().parents[1], 0
    for path in sorted(home.rglob("*.py")):
        value = zlib.crc32(path.read_bytes(), value)
    return f"{value:08x}"


# -- a node ----------------------------------------------------------------------------------------------------
def look_at_node(index: int, ranks: list[int], not_shared: str | None) -> NodeFacts:
    """The node of this process. `not_shared`: the communicator's reason why memory cannot be shared, or None."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = _shared_memory()
    pinned = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return NodeFacts(
        index=index, host=socket.gethostname(), ranks=ranks, cpus=os.cpu_count() or 1, quota=cpu_quota(),
        load=os.getloadavg()[0], memory_total=memory.total, memory_free=memory.available, memory_limit=memory_limit(),
        shm_total=total, shm_free=free, not_shared=not_shared, nvidia=_count("/dev", "nvidia[0-9]*"),
        infiniband=sorted(path.name for path in _glob("/sys/class/infiniband", "*")),
        memlock=None if pinned == resource.RLIM_INFINITY else pinned,
    )  # fmt: skip


def _shared_memory() -> tuple[int, int]:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Average number of cores that this process's control groups (version 2 or 1) grant; None: no limit."""
    found = [
        int(quota) / int(period)
        for quota, period in (text.split()[:2] for text in _group_values(root, "", "cpu.max"))
        if quota != "max"
    ]
    for quota, period in zip(
        _group_values(root, "cpu", "cpu.cfs_quota_us"), _group_values(root, "cpu", "cpu.cfs_period_us"), strict=False
    ):
        if int(quota) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process's control groups (version 2 or 1) grant; None: no limit."""
    texts = _group_values(root, "", "memory.max") + _group_values(root, "memory", "memory.limit_in_bytes")
    limits = [int(text) for text in texts if text != "max"]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def _group_values(root: Path, controller: str, name: str) -> list[str]:
    """Contents of the file `name` in this process's group and all its parents. `controller` "": version 2."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        texts = [_read(folder / name).strip() for folder in (group, *group.parents) if folder.is_relative_to(top)]
        found += [text for text in texts if text]
    return found


# -- the output folder -----------------------------------------------------------------------------------------
def existing_folder(path: Path) -> Path:
    """The folder itself, or its nearest existing parent."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def look_at_folder(node: int, path: Path, probe: str | None) -> FolderFacts:
    """The folder for runs. `probe`: the name of a file that rank 0 created there (None: it could not)."""
    folder = existing_folder(path)
    kind, source = filesystem(folder)
    trace, locking = _try_trace(folder), None
    if trace is None:
        locking = _try_locking(folder)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = 0
    seen = probe is None or (folder / probe).exists()
    return FolderFacts(node, str(folder), kind, source, kind in NETWORK_TYPES, free, seen, trace, locking)


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """(type, mounted device) of the folder's file system; ("", "") if unknown."""
    best, found = -1, ("", "")
    for line in _read(mounts).splitlines():
        head, _, tail = line.partition(" - ")
        point = Path(head.split()[4].encode().decode("unicode_escape"))  # a space is written as \040
        depth = len(point.parts)
        if depth >= best and folder.resolve().is_relative_to(point):
            kind, source = tail.split()[:2]
            best, found = depth, (kind, source)
    return found


def probe_name() -> str:
    """A file name that no other process uses."""
    return f".hpctrain-doctor-{socket.gethostname()}-{os.getpid()}"


def _try_trace(folder: Path) -> str | None:
    """A sentence on why a rank's trace cannot be written there; None if it can."""
    try:
        import time

        from hpctrain.trace.recorder import Recorder
        from hpctrain.trace.writer import TraceWriter
    except Exception as error:
        return f"HDF5 cannot be loaded ({type(error).__name__}: {error}); install h5py"
    path = folder / f"{probe_name()}.h5"
    try:
        TraceWriter(path, Recorder(time.monotonic_ns), {}).close()
    except HpctrainError as error:
        return str(error)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _try_locking(folder: Path) -> str | None:
    """Why HDF5 cannot lock files there. hpctrain does not need locks; other programs that read traces do."""
    import h5py

    path = folder / f"{probe_name()}.lock.h5"
    try:
        h5py.File(path, "w", locking=True).close()
    except OSError as error:
        return str(error)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return None


# -- Slurm -----------------------------------------------------------------------------------------------------
def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that describe the allocation and how the job was started; empty outside a Slurm job."""
    if SLURM.job not in environment:
        return {}
    return {name: environment[name] for name in SLURM.reported if name in environment}


def srun_plugins(environment: Mapping[str, str]) -> list[str]:
    """The values that `srun --mpi=` accepts here; empty if unknown."""
    srun = shutil.which("srun", path=environment.get("PATH"))
    if srun is None:
        return []
    try:
        done = subprocess.run([srun, "--mpi=list"], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return plugins_in(done.stdout + done.stderr)


def plugins_in(text: str) -> list[str]:
    """The names in the output of `srun --mpi=list`: one per line below a heading; old versions prefix "srun:"."""
    lines = [line.removeprefix("srun:").strip() for line in text.splitlines()]
    names = [line for line in lines if re.fullmatch(r"\w+", line)]
    versions = [line.split(":")[1].split(",") for line in lines if "versions available:" in line]
    return sorted({*names, *(name.strip() for line in versions for name in line)})


def _glob(folder: str, pattern: str) -> list[Path]:
    try:
        return list(Path(folder).glob(pattern))
    except OSError:
        return []


def _count(folder: str, pattern: str) -> int:
    return len(_glob(folder, pattern))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
