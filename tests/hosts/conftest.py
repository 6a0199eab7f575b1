"""Tests that build hosts on this machine: `python -m pytest tests/hosts`, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from hpctrain.lab import machine

TOOLS = {"ip": "iproute2", "tc": "iproute2", "iperf3": "iperf3"}


@pytest.fixture(scope="session", autouse=True)
def _can_have_hosts() -> None:
    """If CI is set, missing tools are installed, and a machine that cannot have hosts is a failure; otherwise tests are
    skipped."""
    continuous = os.environ.get("CI", "") not in ("", "0", "false")
    root = os.geteuid() == 0
    if _absent() and continuous and root and shutil.which("apt-get") is not None:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *_absent()]):
            argv = ["apt-get", "-qq", *arguments]
            subprocess.run(argv, env=environment, capture_output=True, timeout=300, check=False)
    why = "hosts need root" if not root else ""
    if absent := _absent():
        why = f"no {', '.join(absent)} here; as root: apt-get install {' '.join(absent)} (or set CI=true)"
    if why:
        (pytest.fail if continuous else pytest.skip)(why)


def _absent() -> list[str]:
    return sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No test leaves hosts behind, or finds any."""
    assert machine.standing() is None, "a lab is up on this machine; hpctrain lab down"
    yield
    try:
        assert not machine._spaces()
    finally:
        machine.remove()
