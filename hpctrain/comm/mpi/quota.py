"""How much processor time this process's control groups allow, as containers and batch systems set it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def processor_quota(process: Path = Path("/proc/self")) -> float:
    """In cores; infinite if there is no limit or none can be read. A group's limit holds for all that is in it."""
    return min((_limit(group) for group in _groups(process)), default=float("inf"))


def _groups(process: Path) -> Iterator[Path]:
    """The folders of the control groups of this process, and of those around them."""
    try:
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        for _, controllers, name in groups:
            unified = kind == "cgroup2" and not controllers
            if unified or (kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options):
                yield from _between(PurePosixPath(fields[3]), Path(fields[4]), PurePosixPath(name))


def _between(root: PurePosixPath, mounted: Path, name: PurePosixPath) -> Iterator[Path]:
    """The folders from the group `name` up to the group `root`, which is visible at `mounted`."""
    if name.is_relative_to(root):
        inner = name.relative_to(root)
        yield from (mounted / part for part in (inner, *inner.parents))


def _limit(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
        return float("inf") if quota == "max" or float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError):
        return float("inf")
