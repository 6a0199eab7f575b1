"""The actions of `hpctrain lab`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpctrain.errors import ClusterError
from hpctrain.hosts import Description
from hpctrain.lab import buildable, machine, ranks
from hpctrain.lab.check import check


def up(path: Path) -> int:
    """Build the cluster of that file; it stays until `down`."""
    cluster = buildable.load(path)
    with machine.only_one():
        _refuse_another(cluster)
        if machine.standing() is None:
            machine.remove()  # remains of a killed lab
            machine.build(cluster)
            machine.keep(cluster)
    print(f"lab {cluster.summary()}; `hpctrain lab down` removes it")
    return 0


def run(path: Path, command: Sequence[str], count: int | None, environment: Mapping[str, str] | None = None) -> int:
    """Start the command on ranks of the cluster's hosts; returns its exit status."""
    with using(buildable.load(path)) as cluster:
        return ranks.run(cluster.each(), command, environment, count)


def look(path: Path) -> int:
    """Measure the cluster's links and processor shares; returns 1 if one is wrong."""
    wrong = 0
    with using(buildable.load(path)) as cluster:
        print(f"lab {cluster.summary()}", flush=True)
        for each in check(cluster):
            print(f"  {each}", flush=True)
            wrong += not each.right
    return int(wrong > 0)


def down() -> int:
    """Remove the hosts, whoever made them."""
    with machine.only_one():
        found = machine.remove()
    print(f"removed {', '.join(found)}" if found else "there is no lab on this machine")
    return 0


@contextmanager
def using(cluster: Description) -> Iterator[Description]:
    """The hosts of that cluster: those that `up` built, or else for the duration of this context."""
    with machine.only_one():
        _refuse_another(cluster)
        own = machine.standing() is None
        if own:
            machine.remove()
            machine.build(cluster)
        try:
            yield cluster
        finally:
            if own:
                machine.remove()


def _refuse_another(cluster: Description) -> None:
    there = machine.standing()
    if there is not None and there != cluster:
        raise ClusterError(
            f"the lab {there.summary()} is up, which is not the cluster of that file; `hpctrain lab down` removes it"
        )
