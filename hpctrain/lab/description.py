"""Clusters described in TOML files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from hpctrain.errors import ClusterError, JobError
from hpctrain.job import file as tomlfile
from hpctrain.job.messages import Fault, faults
from hpctrain.options import Table

MOST_HOSTS = 64


class HostLink(Table):
    """The link from a host to the switch, the same in both directions."""

    mbit_per_s: Annotated[float, Field(ge=0.1, le=1e5)] = 1000.0
    latency_ms: Annotated[float, Field(ge=0, le=1e4)] = 0.0  # one way, added to what the machine itself takes


class HostGroup(Table):
    """`count` equal hosts. `ranks`: on each of them. `cores`: how many of this machine's cores each may use on average;
    None: as many as are free. `link`: None: the cluster's."""

    count: Annotated[int, Field(ge=1, le=MOST_HOSTS)] = 1
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    cores: Annotated[float, Field(ge=0.1, le=1024)] | None = None
    link: HostLink | None = None


class Host(Table):
    """One host. `number` counts from 1."""

    number: int
    ranks: int
    cores: float | None
    link: HostLink

    @property
    def name(self) -> str:
        """Its host name within the cluster."""
        return f"node{self.number}"

    @property
    def address(self) -> str:
        """Its IP address within the cluster."""
        return f"10.213.0.{self.number}"


class Description(Table):
    """A cluster: hosts joined by one switch."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w.-]+$")] = "cluster"
    hosts: Annotated[list[HostGroup], Field(min_length=1)]
    link: HostLink = HostLink()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Description:
        """The cluster in a TOML file. Raises ClusterError with all mistakes."""
        try:
            tables = tomlfile.read(path)
            found = cls.model_validate({"name": Path(path).stem, **tables})
        except JobError as error:
            raise ClusterError(str(error).replace("job file", "cluster file")) from None
        except ValidationError as error:
            mistakes = "; ".join(map(_sentence, faults(error, cls)))
            raise ClusterError(f"{path}: {mistakes}") from None
        if len(found.each()) > MOST_HOSTS:
            raise ClusterError(f"{path}: {len(found.each())} hosts; at most {MOST_HOSTS} fit on one machine")
        return found

    def each(self) -> list[Host]:
        """Every host, in order."""
        groups = [group for group in self.hosts for _ in range(group.count)]
        return [
            Host(number=number, ranks=group.ranks, cores=group.cores, link=group.link or self.link)
            for number, group in enumerate(groups, start=1)
        ]

    def summary(self) -> str:
        """The cluster in one line."""
        hosts = self.each()
        rates = sorted({host.link.mbit_per_s for host in hosts})
        cores = sorted({host.cores for host in hosts if host.cores is not None})
        parts = [f"{len(hosts)} host{'s' * (len(hosts) > 1)}", f"{_range(rates)} Mbit/s"]
        if cores:
            limited = sum(host.cores is not None for host in hosts)
            parts.append(f"{_range(cores)} cores {'each' if limited == len(hosts) else f'on {limited} of them'}")
        return f"{self.name}: {', '.join(parts)}"


def _range(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _sentence(fault: Fault) -> str:
    return str(fault).replace("the job:", "the cluster:")
