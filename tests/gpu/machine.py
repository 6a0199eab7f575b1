"""Runs tests/gpu and `hpctrain bench device` on a machine that has a GPU, torch and CuPy, but perhaps no network.

    python3 tests/gpu/machine.py [--wheels FOLDER] [--out FOLDER]     make test-gpu [WHEELS=FOLDER] [OUT=FOLDER]
    python3 tests/gpu/machine.py --collect FOLDER [--python 3.12]     make gpu-wheels WHEELS=FOLDER [GPU_PYTHON=3.12]

It uses the Python that runs it, which must be the one that has torch. What else is needed goes into .venv-gpu, where
the machine's own packages stay visible: from the wheels in the folder, or from the index. Torch, NumPy and CuPy are
never installed, replaced or downloaded. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv-gpu"
OLDEST = {"torch": (2, 8), "numpy": (2,)}  # what the machine must have; CuPy 14 needs NumPy 2
FIXED = re.compile(r"torch|numpy|cupy.*|nvidia-.*|triton")  # never to be replaced
# What tests/gpu and the bench import. The data set digits is a file of scikit-learn, which itself is never imported, so
# its own requirements (SciPy: 34 MiB) are left out.
NEEDED = ("mpi4py>=4.1", "h5py", "pydantic>=2", "safetensors", "psutil", "greenlet", "ml_dtypes", "tomli_w",
          "pytest>=8", "pytest-timeout")  # fmt: skip
WITHOUT_REQUIREMENTS = ("scikit-learn",)
MPI = "mpich"  # for a machine without an mpi4py of its own
# And what these need in turn, to be collected for a machine without a network. Listed here, because pip would look for
# requirements of the Python that runs it, and would add NumPy.
BENEATH = ("pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "iniconfig", "pluggy",
           "packaging", "pygments")  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip
MOST_MIB = 60
WHY_NOT = """
from hpctrain.bench import CHOICES
from hpctrain.comm.device.gpu import usable_gpus
gpus, why = usable_gpus()
known = "device" in CHOICES
print((why or "torch sees no GPU here") if gpus == 0 else "" if known else "hpctrain bench has no `device`")
"""  # printed by .venv-gpu's Python; empty: the bench can run
SECONDS: dict[str, float] = {"tests": 200, "bench": 90}  # with a minute to install, below six minutes in total


class MachineError(Exception):
    """This machine cannot run the tests; the message says what to do."""


def installed() -> dict[str, str]:
    """The versions of this Python's distributions, by normalised name."""
    found = [(distribution.metadata["Name"], distribution.version) for distribution in distributions()]
    return {_normal(name): version for name, version in reversed(found) if name}


def check(packages: dict[str, str], python: tuple[int, ...] = sys.version_info[:2]) -> None:
    """Raise MachineError if the machine's own packages do not suffice. CuPy may be missing: then tests are skipped."""
    if python < (3, 11):
        own = ".".join(map(str, python))
        raise MachineError(f"hpctrain needs Python 3.11 or newer, not {own}; name another: make test-gpu PYTHON=...")
    for name, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        if name not in packages:
            raise MachineError(f"{sys.executable} has no {name}; name the Python that has it: make test-gpu PYTHON=...")
        if tuple(map(int, re.findall(r"\d+", packages[name])[: len(oldest)])) < oldest:
            raise MachineError(f"{sys.executable} has {name} {packages[name]}, but {wanted} or newer is needed")


def constraints(packages: dict[str, str], pins: str) -> list[str]:
    """Constraints for pip: what must not change stays as it is; what the machine lacks gets the version in `pins`."""
    fixed = [f"{name}=={version}" for name, version in sorted(packages.items()) if FIXED.fullmatch(name)]
    lines = [line.strip() for line in pins.splitlines() if "==" in line and not line.startswith("#")]
    return fixed + [line for line in lines if _normal(line.partition("==")[0]) not in packages]


def install(wheels: Path | None) -> Path:
    """Make .venv-gpu, or complete it; returns its Python."""
    packages = installed()
    check(packages)
    python, made_with = HOME / "bin" / "python", HOME / "made-with"
    if not made_with.exists() or made_with.read_text() != sys.executable:
        print(f"making {HOME}", flush=True)
        _call([sys.executable, "-m", "venv", "--clear", *_venv_options(), str(HOME)])
        made_with.write_text(sys.executable)
    (_site_packages() / "machine.pth").write_text("\n".join(_own_folders()) + "\n")
    limits = HOME / "constraints.txt"
    limits.write_text("\n".join(constraints(packages, (ROOT / "constraints.txt").read_text())) + "\n")
    pip = [*_pip(python), "install", "--quiet", "--constraint", str(limits)]
    pip += ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
    print("installing what is missing", flush=True)
    _call([*pip, *NEEDED, *(() if "mpi4py" in packages else (MPI,))])
    missing = [name for name in WITHOUT_REQUIREMENTS if name not in packages]
    if missing:
        _call([*pip, "--no-deps", *missing])
    return python


def run(python: Path, out: Path) -> int:
    """Run the tests and the bench, each within its time; returns the status of the first that failed, or 0."""
    out.mkdir(parents=True, exist_ok=True)
    pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'gpu-tests.xml'}"]
    statuses = [within("tests", [*pytest, "tests/gpu"])]
    if (why := _no_bench(python)) is not None:
        print(f"no bench: {why}", flush=True)
    else:
        bench = [str(python), "-m", "hpctrain", "bench", "device", "--json", str(out / "gpu.json")]
        statuses.append(within("bench", bench))
    print(f"results in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", flush=True)
    return next((status for status in statuses if status), 0)


def within(part: str, command: Sequence[str]) -> int:
    """The command's status; 124 if it had to be interrupted, as with `timeout`. It may then still clean up for 10 s."""
    began, seconds = time.monotonic(), SECONDS[part]
    started = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), start_new_session=True, preexec_fn=_let_interrupts_through
    )
    with started as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"{part}: not done after {seconds:g} s", flush=True)
            os.killpg(process.pid, signal.SIGINT)  # so that pytest ends its ranks, and writes its results
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            status = 124
    print(f"{part}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
    return status


def _let_interrupts_through() -> None:
    """A shell without job control starts what is in the background with SIGINT ignored, and programs inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def collect(folder: Path, version: str) -> None:
    """Download the wheels for a machine with that Python. Raises MachineError if they are too large."""
    names = [*NEEDED, MPI, *WITHOUT_REQUIREMENTS, *BENEATH]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _call([*pip, *target, "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *names])
    size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size:.1f} MiB, in {folder}")
    if size > MOST_MIB:
        raise MachineError(f"the wheels are larger than {MOST_MIB} MiB; is something else in {folder}?")


def _no_bench(python: Path) -> str | None:
    """Why the bench cannot run; None if it can."""
    done = subprocess.run([python, "-c", WHY_NOT], cwd=ROOT, env=_environment(), capture_output=True, text=True)
    return (done.stdout.strip() or None) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [str(HOME / "bin"), os.environ["PATH"]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(programs)}


def _venv_options() -> list[str]:
    """If this Python is an environment itself, --system-site-packages would pass over it, to the Python beneath:
    machine.pth names its packages instead. Debian has no pip for new environments, but this Python's own will do."""
    system = [] if sys.prefix != sys.base_prefix else ["--system-site-packages"]
    return [*system, *(["--without-pip"] if _has_pip() else [])]


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _pip(python: Path) -> list[str]:
    own = [sys.executable, "-m", "pip", "--python", str(python)]
    return [*(own if _has_pip() else [str(python), "-m", "pip"]), "--disable-pip-version-check"]


def _own_folders() -> list[str]:
    """The folders of this Python's packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(HOME), "platbase": str(HOME)}))


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        raise MachineError(f"failed with status {done.returncode}: {' '.join(command)}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="install from the wheels in this folder, without an index")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="for gpu.json and gpu-tests.xml")
    parser.add_argument("--collect", type=Path, help="only download wheels into this folder")
    parser.add_argument("--python", default="3.12", help="the Python of the machine that wheels are collected for")
    chosen = parser.parse_args()
    try:
        if chosen.collect is not None:
            collect(chosen.collect, chosen.python)
            return 0
        return run(install(chosen.wheels), chosen.out.resolve())
    except MachineError as error:
        print(f"test-gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
