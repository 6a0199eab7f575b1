"""A real Slurm on this machine (munged, slurmctld and several slurmds); needs no root once installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
# srun --mpi=pmix loads libpmix.so, which only the development package contains.
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "libpmix-dev")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
SBIN = "/usr/sbin"

# TmpFS has %n because two slurmds would collide over PMIx; slurmd ends without cgroup mounts unless told
# cgroup/v1; a requeued job would wait 121 s unless credentials expire soon.
SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=300
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class SlurmError(RuntimeError):
    """Slurm did not do what the test needs; the message ends with its logs."""


def missing() -> list[str]:
    """The Slurm programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def install() -> None:
    """Install Slurm with apt. Needs root. Raises SlurmError with the reason."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SlurmError("installing Slurm needs root and apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise SlurmError(f"apt-get {arguments[0]} failed: {done.stderr[-500:] or done.stdout[-500:]}")


class Slurm:
    """`nodes` nodes n1, n2, ... of `cpus` CPUs, all of them this machine; state and logs under `folder`.

    `folder`'s path must be short (the munge socket is in it) and all its parents readable.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 8) -> None:
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.cpus = cpus
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PMI", "OMPI_COMM"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }

    def start(self, seconds: float = 30.0) -> None:
        """Start all daemons and wait until the nodes are idle. Raises SlurmError, with nothing left running."""
        try:
            self._configure()
            self._start_munge()
            conf = self.environment["SLURM_CONF"]
            self.command("slurmctld", "-f", conf)
            for node in self.nodes:
                self.command("slurmd", "-f", conf, "-N", node)
            self._wait_idle(time.monotonic() + seconds)
        except BaseException:
            self.stop()
            raise

    def command(self, *argv: str, cwd: Path | None = None, seconds: float = 60.0) -> str:
        """Run one of Slurm's programs and return what it printed. Raises SlurmError."""
        try:
            done = subprocess.run(argv, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise SlurmError(f"{argv[0]} took longer than {seconds:g} s\n{self.logs()}") from error
        if done.returncode:
            raise SlurmError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr}{done.stdout}\n{self.logs()}")
        return done.stdout

    def submit(
        self, *argv: str | Path, cwd: Path, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> int:
        """sbatch a script with arguments from `cwd`; returns the job's number."""
        exports = ",".join(["ALL", *(f"{k}={v}" for k, v in (environment or {}).items())])
        out = self.command("sbatch", "--parsable", f"--export={exports}", *options, *map(str, argv), cwd=cwd)
        return int(out.split(";")[0])

    def state(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.command("scontrol", "show", "job", str(job), "--oneliner")
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, job: int, seconds: float) -> str:
        """Wait until the job has ended (not: was requeued); returns its state. Raises SlurmError when late."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)["JobState"]) not in ENDED:
            if time.monotonic() > deadline:
                raise SlurmError(f"job {job} is still {state} after {seconds:g} s\n{self.logs()}")
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        texts = []
        for file in sorted((self.folder / "log").glob("*.log")):
            lines = file.read_text(errors="replace").splitlines()[-8:]
            texts.append(f"-- {file.name}\n" + "\n".join(lines))
        return "\n".join(texts)

    def stop(self) -> None:
        """Cancel all jobs and end every process of this Slurm: daemons, steps and the jobs' own processes."""
        with contextlib.suppress(SlurmError, OSError):
            self.command("scancel", "--state=RUNNING", "--quiet", f"--user={_user()}", seconds=5)
        for number in (signal.SIGTERM, signal.SIGKILL):
            processes = self.processes()
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(processes, timeout=5)

    def processes(self) -> list[psutil.Process]:
        """Every living process started by this Slurm, recognised by its environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _configure(self) -> None:
        for name in ("state", "spool", "log", "run", "munge", "tmp"):
            (self.folder / name).mkdir(parents=True)
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
            (self.folder / "tmp" / node).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            "RealMemory=4000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        text = SLURM_CONF.format(host=host, user=_user(), folder=self.folder, port=ports[0], nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.command("munged", "--num-threads=2", *(f"--{k}={munge / v}" for k, v in files.items()))

    def _wait_idle(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(SlurmError):
                states = self.command("sinfo", "--noheader", "--Node", "--format=%T", seconds=10).split()
                if states == ["idle"] * len(self.nodes):
                    return
            if time.monotonic() > deadline:
                raise SlurmError(f"the nodes did not become idle\n{self.logs()}")
            time.sleep(0.2)


def _path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + os.pathsep + SBIN


def _user() -> str:
    return psutil.Process().username()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
