"""The environment in which ranks are started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hpctrain.launcher.facts import launcher_of
from hpctrain.launcher.mpiexec import Library
from hpctrain.launcher.started import without_launcher

# The C library's allocator keeps freed memory, in huge pages where the system allows them. The first touch of fresh
# memory takes longer than all copying when phases of a large model change (`hpctrain bench switch`).
MEMORY = ":".join(
    f"glibc.malloc.{key}" for key in ("hugetlb=1", "mmap_max=0", "trim_threshold=1000000000000000", "top_pad=67108864")
)


def rank_environment(library: Library, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for ranks on this machine. Variables that the user has set are kept."""
    launcher = launcher_of(library.kind)
    wanted = {"GLIBC_TUNABLES": MEMORY, **launcher.defaults}
    if os.geteuid() == 0:
        wanted |= launcher.root
    if library.wheel:
        wanted |= launcher.wheel
    return {**wanted, **without_launcher(environment)}
