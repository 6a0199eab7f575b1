"""The output of `hpctrain doctor`: the facts in a few lines, then each problem with advice."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from statistics import median

from hpctrain.doctor.facts import GIB, Facts, FolderFacts, Link, RankFacts, named, ranges
from hpctrain.doctor.problem import SEVERITIES, Problem, counted, millions, speed
from hpctrain.launcher.facts import SLURM

WIDTH = 120
MARGIN = 11
MOST_NODES = 16


def as_json(facts: Facts, found: Sequence[Problem]) -> str:
    """One object: {"facts": {...}, "problems": [{"severity", "where", "what", "do"}, ...]}."""
    return json.dumps({"facts": facts.plain(), "problems": [vars(problem) for problem in found]}, indent=1)


def as_text(facts: Facts, found: Sequence[Problem]) -> str:
    """The facts and problems as aligned text."""
    size, nodes = facts.size, len(facts.nodes)
    lines = [f"hpctrain doctor: {size} rank{'s' * (size > 1)} on {nodes} node{'s' * (nodes > 1)}", ""]
    for label, texts in _sections(facts):
        for index, text in enumerate(texts):
            lines += _wrapped("" if index else label, text)
    lines += ["", _count(found)]
    for problem in found:
        lines += _wrapped(problem.severity, f"{problem.where}: {problem.what}")
        lines += _wrapped("", f"-> {problem.do}")
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    head = label.ljust(MARGIN)
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * MARGIN, break_long_words=False)


def _count(found: Sequence[Problem]) -> str:
    if not found:
        return "no problems found"
    counts = [(severity, sum(p.severity == severity for p in found)) for severity in SEVERITIES]
    return ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts if count)


def _sections(facts: Facts) -> Iterator[tuple[str, list[str]]]:
    yield "MPI", list(_mpi(facts))
    if facts.ranks[0].versions:
        versions = facts.ranks[0].versions
        listed = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "MPI")
        alike = all(rank.versions == versions for rank in facts.ranks)
        yield "software", [listed + ("" if facts.size == 1 else ", the same on all ranks" if alike else " on rank 0")]
    yield "ranks", list(_ranks(facts))
    if facts.mpi.transport_why:
        yield "GPUs", [facts.mpi.transport_why]
    yield "memory", list(_memory(facts))
    if facts.links:
        yield "messages", list(_links(facts))
    if facts.folders:
        yield "output", [_folder(facts.folders[0])]
    if facts.slurm:
        yield "Slurm", [", ".join(f"{name.removeprefix(SLURM.prefix)}={value}" for name, value in facts.slurm.items())]
        if facts.plugins:
            yield "", [f"srun --mpi= accepts {', '.join(facts.plugins)}; this library needs {facts.mpi.srun_needs}"]
    if facts.job is not None:
        yield "job", list(_job(facts))


def _mpi(facts: Facts) -> Iterator[str]:
    mpi = facts.mpi
    if not mpi.library:
        yield "none that mpi4py can load"
        return
    knows = {True: "CUDA-aware", False: "not CUDA-aware", None: "does not say whether it is CUDA-aware"}
    more = [f"MPI {mpi.standard}", mpi.thread_level, knows[mpi.cuda_aware]] if mpi.standard else []
    yield ", ".join([_tidy(mpi.library), *more])
    if mpi.launcher:
        yield f"started by {mpi.launcher}"
    if mpi.mpiexec is None:
        yield "no mpiexec on the path" + (f"; `hpctrain run` uses {mpi.runs_with}" if mpi.runs_with else "")
    else:
        whose = f"belongs to {'this library' if mpi.belongs else mpi.mpiexec_kind}"
        uses = f"uses {'it' if mpi.runs_with == mpi.mpiexec else mpi.runs_with}" if mpi.runs_with else "finds none"
        yield f"mpiexec on the path: {mpi.mpiexec}, {whose}; `hpctrain run` {uses}"


def _tidy(library: str) -> str:
    return " ".join(library.replace("Version:", "").split(", package:")[0].split())


def _ranks(facts: Facts) -> Iterator[str]:
    for node in facts.nodes[:MOST_NODES]:
        ranks = facts.on(node)
        quota = f" (at most {node.quota:g} on average)" if node.quota is not None else ""
        devices = dict.fromkeys(rank.device for rank in ranks)
        threads = sorted({rank.threads for rank in ranks})
        count = "-".join(map(str, threads[:1] + threads[1:][-1:]))
        yield (
            f"{node.host}: {named(node.ranks)}, {_affinity(ranks)} of {node.cpus}{quota}, {count} torch "
            f"thread{'s' * (threads != [1])} each, on {', '.join(devices)}"
        )
    if len(facts.nodes) > MOST_NODES:
        yield f"and {counted(len(facts.nodes) - MOST_NODES, 'more node')} (--json lists all)"


def _affinity(ranks: list[RankFacts]) -> str:
    sets = {tuple(rank.cores) for rank in ranks}
    if len(sets) == 1:
        return f"cores {ranges(ranks[0].cores)}"
    shown = "; ".join(ranges(rank.cores) for rank in ranks[:4]) + ("; ..." if len(ranks) > 4 else "")
    return f"each bound to cores ({shown})"


def _memory(facts: Facts) -> Iterator[str]:
    few = min(facts.nodes, key=lambda node: node.memory_free)
    shm = min(facts.nodes, key=lambda node: node.shared_parameters)
    least = "" if len(facts.nodes) == 1 else f" on {few.host}, the lowest"
    yield f"{few.memory_free / GIB:.1f} of {few.memory_total / GIB:.1f} GiB free{least}"
    where = "" if len(facts.nodes) == 1 else f" on {shm.host}, the lowest"
    ranks = f"{len(shm.ranks)} ranks can share" if len(shm.ranks) > 1 else "enough for"
    yield (
        f"/dev/shm: {shm.shm_free / GIB:.2f} GiB free{where}; {ranks} models of up to "
        f"{millions(shm.shared_parameters)} parameters (float32)"
    )


def _links(facts: Facts) -> Iterator[str]:
    for place, within, there in zip(("within a node", "between nodes"), (True, False), facts.pairs, strict=True):
        links = [link for link in facts.links if link.within == within]
        if links:
            yield f"{place}: {_spread(links)} ({_measured(links, there)})"
    if any(len(node.ranks) > len(set().union(*(rank.cores for rank in facts.on(node)))) for node in facts.nodes):
        yield "waiting ranks nap for 50 us at a time, as in a run: there are more ranks than cores"


def _measured(links: list[Link], there: int) -> str:
    pairs = f"{len(links)} of {there} pairs" if len(links) < there else f"{len(links)} pair{'s' * (len(links) > 1)}"
    return f"{pairs}, 8 bytes and {min(link.nbytes for link in links) / 2**20:g} MiB"


def _spread(links: list[Link]) -> str:
    latencies, wide = [link.latency_us for link in links], [link.bandwidth_gb_s for link in links]
    text = f"{median(latencies):.3g} us, {speed(median(wide))}"
    if len(links) == 1:
        return text
    return f"{text}; from {min(latencies):.3g} to {max(latencies):.3g} us, {speed(min(wide))} to {speed(max(wide))}"


def _folder(folder: FolderFacts) -> str:
    place = "network" if folder.network else "local"
    locks = "files can be locked" if folder.locking is None else "files cannot be locked"
    if folder.trace is not None:
        locks = "no trace can be written"
    return f"{folder.path}: {folder.type or 'unknown'} ({place}), {folder.free / GIB:.1f} GiB free, {locks}"


def _job(facts: Facts) -> Iterator[str]:
    job = facts.job
    assert job is not None
    if job.parameters:
        known = f", {job.samples:,} training samples" if job.samples is not None else ""
        yield f"{job.path}: {job.parameters:,} parameters, {job.nbytes / 2**20:.3g} MiB per arena{known}"
    for index, phase in enumerate(job.phases):
        servers = f", servers {ranges(phase['servers'])}" if phase["servers"] else ""
        yield f"phase {index}: {phase['strategy']}, workers {ranges(phase['workers'])}{servers}"
