"""Which described clusters the laboratory can build."""

from __future__ import annotations

import os

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description, Host

MOST_BUILT = 64
MOST_MBIT = 1e5
# Keys of hosts that a laboratory cannot build, and what to do instead. Ignored, they would change what is measured.
UNBUILT = {
    "speed": "give slower hosts fewer `cores`",
    "jitter": "leave it out",
    "slow": "leave it out",
    "device": "leave device and devices out",
    "memory_gbyte_per_s": "leave it out",
}


def load(path: str | os.PathLike[str]) -> Description:
    """The cluster in a TOML file. Raises ClusterError if it is not valid, or not one that this machine can become."""
    cluster = Description.load(path)
    hosts = cluster.each()
    if len(hosts) > MOST_BUILT:
        raise ClusterError(f"{path}: {len(hosts)} hosts; at most {MOST_BUILT} fit on one machine")
    plain = Host.model_fields
    reasons = [
        f"{key} of {host.name} ({advice})"
        for key, advice in UNBUILT.items()
        if (host := next((h for h in hosts if getattr(h, key) != plain[key].default), None)) is not None
    ]
    if len({host.rack for host in hosts}) > 1:
        reasons.append("several racks (leave `rack` out)")
    if max(host.link.mbit_per_s for host in hosts) > MOST_MBIT:
        reasons.append(f"links of more than {MOST_MBIT:g} Mbit/s")
    cores, available = sum(host.cores or 0.0 for host in hosts), os.cpu_count() or 1
    if cluster.machine_cores not in (None, available):
        reasons.append(f"machine_cores = {cluster.machine_cores} on a machine with {available} (leave the key out)")
    if cores > available:
        reasons.append(f"hosts of {cores:g} cores in total on the {available} of this machine (give `cores` in parts)")
    if reasons:
        raise ClusterError(
            f"{path}: the laboratory cannot build {'; nor '.join(reasons)}. A measurement would be of another cluster; "
            "`hpctrain simulate` computes what this one would do"
        )
    return cluster
