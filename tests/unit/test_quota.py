"""The processor time that control groups allow: version 1 and 2, nested, seen from inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.comm.mpi.quota import processor_quota

V1 = "30 29 0:26 {root} {at} rw,relatime shared:8 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 29 0:27 {root} {at} rw shared:9 - cgroup2 cgroup2 rw\n"

NONE = float("inf")


def _process(folder: Path, mount: str, root: str, groups: str) -> Path:
    process = folder / "process"
    process.mkdir()
    process.joinpath("mountinfo").write_text(
        "29 1 8:1 / / rw - ext4 /dev/sda rw\n" + mount.format(root=root, at=folder / "groups")
    )
    process.joinpath("cgroup").write_text(groups)
    return process


def _group(folder: Path, name: str, **files: str) -> None:
    group = folder / "groups" / name
    group.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        group.joinpath(f"cpu.{file}").write_text(text + "\n")


@pytest.mark.parametrize(("own", "around", "cores"), [("50000", "-1", 0.5), ("-1", "150000", 1.5), ("-1", "-1", NONE)])
def test_version_1(tmp_path: Path, own: str, around: str, cores: float):
    process = _process(tmp_path, V1, "/", "4:cpu,cpuacct:/job/step\n1:name=systemd:/\n")
    _group(tmp_path, "job", cfs_quota_us=around, cfs_period_us="100000")
    _group(tmp_path, "job/step", cfs_quota_us=own, cfs_period_us="100000")
    assert processor_quota(process) == cores


@pytest.mark.parametrize(("limit", "cores"), [("25000 100000", 0.25), ("max 100000", NONE), ("?", NONE)])
def test_version_2_in_a_container(tmp_path: Path, limit: str, cores: float):
    process = _process(tmp_path, V2, "/docker/1", "0::/docker/1\n")
    _group(tmp_path, ".", max=limit)
    assert processor_quota(process) == cores


def test_nothing_known(tmp_path: Path):
    assert processor_quota(tmp_path) == NONE
