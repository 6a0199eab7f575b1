"""Problems with messages between ranks, and advice: pure functions of the doctor's facts."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from hpctrain.doctor.facts import GIB, Facts, Link, NodeFacts, named
from hpctrain.doctor.problem import Problem, at, speed
from hpctrain.launcher.facts import OPEN_MPI_IDLE

SLOW_LINK = 0.06  # GB/s: half the rate of 1 Gbit/s
SLOW_NODE_US = 1000.0  # within a node; 1 to 50 is common
FABRIC_US, FABRIC = 15.0, 3.0  # us, GB/s: InfiniBand is below the first and above the second, TCP is not
FORK_VARIABLES = ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "UCX_IB_FORK_INIT")


def links(facts: Facts) -> Iterator[Problem]:
    """Problems with messages that are slower than expected."""
    within = [link for link in facts.links if link.within]
    between = [link for link in facts.links if not link.within]
    crowded = [node for node in facts.nodes if len(node.ranks) > _node_cores(facts, node)]
    idle = facts.ranks[0].environment.get(OPEN_MPI_IDLE)
    if crowded and facts.mpi.kind == "openmpi" and idle not in ("1", "true"):
        yield Problem(
            "warning", "MPI", "Open MPI's ranks keep their cores while they wait, and there are more ranks than "
            "cores: an all-reduce takes milliseconds",
            f"export {OPEN_MPI_IDLE}=1, or start the ranks with `hpctrain run`",
        )  # fmt: skip
    if within and not crowded and median(_latencies(within)) > SLOW_NODE_US:
        yield Problem(
            "warning", "messages", f"within a node a message takes {median(_latencies(within)):,.0f} us; 1 to 50 is "
            "common",
            "check for other processes on these cores, and what the MPI library uses within a node (UCX_TLS, "
            "OMPI_MCA_btl)",
        )  # fmt: skip
    if not between:
        return
    if any(node.infiniband for node in facts.nodes) and not _like_a_fabric(between):
        names = sorted({name for node in facts.nodes for name in node.infiniband})
        yield Problem(
            "warning", "messages", f"nodes have a fast network ({', '.join(names)}), but messages between them take "
            f"{median(_latencies(between)):.0f} us and {speed(median(_bandwidths(between)))}, like TCP",
            "use an MPI that is built for it (the site's module), and check UCX_TLS, UCX_NET_DEVICES and FI_PROVIDER",
        )  # fmt: skip
    elif median(_bandwidths(between)) < SLOW_LINK:
        yield Problem(
            "warning", "messages", "the bandwidth between nodes is only "
            f"{speed(median(_bandwidths(between)))}: exchange may take longer than computing",
            "check that MPI uses the fastest network; exchange less often (train.accumulate)",
        )  # fmt: skip


def slow_pairs(facts: Facts) -> Iterator[Problem]:
    """Pairs that are slower than similar ones: a bad cable, a busy node."""
    for place, within in (("within a node", True), ("between nodes", False)):
        links = [link for link in facts.links if link.within == within]
        if len(links) < 3 or (within and any(len(n.ranks) > _node_cores(facts, n) for n in facts.nodes)):
            continue
        usual = median(_bandwidths(links))
        for link in links:
            if link.bandwidth_gb_s < usual / 3:
                hosts = " and ".join(dict.fromkeys(facts.nodes[i].host for i in link.nodes))
                yield Problem(
                    "warning", f"{named(list(link.ranks))} ({hosts})", f"{speed(link.bandwidth_gb_s)}, while other "
                    f"pairs {place} reach {speed(usual)}", "repeat; if it persists, exclude that node (sbatch "
                    "--exclude) and report it to the site",
                )  # fmt: skip


def fork(facts: Facts) -> Iterator[Problem]:
    """Problems with what InfiniBand requires of processes: safe forks, enough pinned memory."""
    for node in facts.nodes:
        first = facts.ranks[node.ranks[0]]
        if not node.infiniband or facts.size == 1:
            continue
        if not any(name in first.environment for name in FORK_VARIABLES):
            yield Problem(
                "note", at(node), "a process that forks while InfiniBand is in use may crash, or send wrong data",
                "let data sets use threads (data.threads) or spawned processes, or export RDMAV_FORK_SAFE=1",
            )  # fmt: skip
        if node.memlock is not None and node.memlock < GIB:
            yield Problem(
                "warning", at(node), f"a process may pin only {node.memlock / 2**20:,.0f} MiB (ulimit -l), but "
                "InfiniBand needs more", "ask the site to set it to unlimited, also for Slurm's daemon",
            )  # fmt: skip
        return


def _node_cores(facts: Facts, node: NodeFacts) -> int:
    return len(set().union(*(rank.cores for rank in facts.on(node))))


def _like_a_fabric(links: list[Link]) -> bool:
    return median(_latencies(links)) < FABRIC_US or median(_bandwidths(links)) > FABRIC


def _latencies(links: list[Link]) -> list[float]:
    return [link.latency_us for link in links]


def _bandwidths(links: list[Link]) -> list[float]:
    return [link.bandwidth_gb_s for link in links]
