"""Clusters described in TOML files, for the laboratory, which builds them, and the simulator, which computes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from hpctrain.errors import ClusterError, JobError
from hpctrain.job import file as tomlfile
from hpctrain.job.messages import Fault, faults
from hpctrain.options import Table

MOST_HOSTS = 4096


class HostLink(Table):
    """The link from a host to the switch, the same in both directions."""

    mbit_per_s: Annotated[float, Field(ge=0.1, le=1e7)] = 1000.0
    latency_ms: Annotated[float, Field(ge=0, le=1e4)] = 0.0  # of what a host sends, besides what the machine takes


class SlowSpells(Table):
    """A host that computes `factor` times slower for `for_s` seconds out of every `every_s`."""

    every_s: Annotated[float, Field(gt=0, le=1e6)]
    for_s: Annotated[float, Field(gt=0, le=1e6)]
    factor: Annotated[float, Field(ge=1, le=1000)]

    @model_validator(mode="after")
    def _shorter_than_its_period(self) -> Self:
        if self.for_s > self.every_s:
            raise ValueError(f"for_s = {self.for_s:g} must be at most every_s = {self.every_s:g}")
        return self


class HostTraits(Table):
    """What a host is like, apart from its link."""

    ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    cores: Annotated[float, Field(ge=0.1, le=1024)] | None = None  # that its ranks may use on average; None: all free
    speed: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0  # of computing, relative to the calibrated machine
    jitter: Annotated[float, Field(ge=0, le=2)] = 0.0  # sigma of the log-normal distribution of computing times
    slow: SlowSpells | None = None
    device: Annotated[str, Field(max_length=40, pattern=r"^[\w.-]*$")] = ""  # the name of its kind of accelerator
    devices: Annotated[int, Field(ge=0, le=64)] = 0  # accelerators; the host's ranks take them in turn
    rack: Annotated[int, Field(ge=1, le=MOST_HOSTS)] = 1
    memory_gbyte_per_s: Annotated[float, Field(ge=0.01, le=1e5)] | None = None  # of copies; None: as calibrated

    @model_validator(mode="after")
    def _accelerators_have_a_name(self) -> Self:
        if bool(self.device) != bool(self.devices):
            raise ValueError('device (such as "a100") and devices (their number on a host) must be given together')
        return self


class HostGroup(HostTraits):
    """`count` equal hosts. `link`: None: the cluster's."""

    count: Annotated[int, Field(ge=1, le=MOST_HOSTS)] = 1
    link: HostLink | None = None


class Host(HostTraits):
    """One host. `number` counts from 1."""

    number: int
    link: HostLink

    @property
    def name(self) -> str:
        """Its host name within the cluster."""
        return f"node{self.number}"

    @property
    def address(self) -> str:
        """Its IP address within the cluster."""
        return f"10.213.0.{self.number}"


class HostSwitch(Table):
    """What joins the hosts. With several racks, each has an uplink of the sum of its hosts' links, divided by
    `oversubscription`, to a switch that never blocks."""

    oversubscription: Annotated[float, Field(ge=1, le=1000)] = 1.0


class Description(Table):
    """A cluster: hosts joined by a switch."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w.-]+$")] = "cluster"
    hosts: Annotated[list[HostGroup], Field(min_length=1)]
    link: HostLink = HostLink()
    switch: HostSwitch = HostSwitch()
    machine_cores: Annotated[int, Field(ge=1, le=1024)] | None = None  # of the one machine that the hosts are on

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Description:
        """The cluster in a TOML file. Raises ClusterError with all mistakes."""
        try:
            tables = tomlfile.read(path)
            if (other := tomlfile.other_than("cluster file", tables)) is not None:
                raise ClusterError(f"{path} is a {other}, not a cluster file")
            found = cls.model_validate({"name": Path(path).stem, **tables})
        except JobError as error:
            raise ClusterError(str(error).replace("job file", "cluster file")) from None
        except ValidationError as error:
            mistakes = "; ".join(map(_sentence, faults(error, cls)))
            raise ClusterError(f"{path}: {mistakes}") from None
        count = sum(group.count for group in found.hosts)
        if count > MOST_HOSTS:
            raise ClusterError(f"{path}: {count} hosts; a cluster may have at most {MOST_HOSTS}")
        return found

    def each(self) -> list[Host]:
        """Every host, in order."""
        groups = [group for group in self.hosts for _ in range(group.count)]
        return [
            Host(number=number, link=group.link or self.link, **{key: getattr(group, key) for key in TRAITS})
            for number, group in enumerate(groups, start=1)
        ]

    def summary(self) -> str:
        """The cluster in one line."""
        hosts = self.each()
        rates = sorted({host.link.mbit_per_s for host in hosts})
        speeds = sorted({host.speed for host in hosts})
        racks = len({host.rack for host in hosts})
        limited = [host.cores for host in hosts if host.cores is not None]
        equipped = [f"{host.devices} {host.device}" for host in hosts if host.devices]
        parts = [f"{len(hosts)} host{'s' * (len(hosts) > 1)}", f"{_range(rates)} Mbit/s"]
        if limited:
            parts.append(f"{_range(sorted(set(limited)))} cores {_on(len(limited), len(hosts))}")
        if equipped:
            parts.append(f"{' or '.join(sorted(set(equipped)))} {_on(len(equipped), len(hosts))}")
        if speeds != [1.0]:
            parts.append(f"speed {_range(speeds)}")
        if racks > 1:
            parts.append(f"{racks} racks, oversubscribed {self.switch.oversubscription:g} to 1")
        return f"{self.name}: {', '.join(parts)}"


TRAITS = tuple(HostTraits.model_fields)


def nodes(hosts: Sequence[Host], count: int | None = None) -> tuple[int, ...]:
    """The host of each rank, as its index in `hosts`, for as many ranks as there are places, or `count` of them; host
    after host is filled. Raises ClusterError if there are not enough places."""
    places = [index for index, host in enumerate(hosts) for _ in range(host.ranks)]
    count = len(places) if count is None else count
    if not 1 <= count <= len(places):
        raise ClusterError(
            f"-n {count}: the cluster has places for 1 to {len(places)} ranks; raise `ranks` of its hosts"
        )
    return tuple(places[:count])


def _range(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _on(some: int, of: int) -> str:
    return "each" if some == of else f"on {some} of them"


def _sentence(fault: Fault) -> str:
    return str(fault).replace("the job:", "the cluster:").replace("; a job has", "; a cluster has")
