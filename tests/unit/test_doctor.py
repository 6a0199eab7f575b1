"""`hpctrain doctor`: the problems it finds in planted facts, how it reads a machine, and its guard against hanging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpctrain import launcher
from hpctrain.cli import main
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.doctor import gather, links, machine, report
from hpctrain.doctor.facts import Facts as Found
from hpctrain.doctor.facts import FolderFacts, JobFacts, Link, MpiFacts, NodeFacts, RankFacts, ranges
from hpctrain.doctor.problem import Problem
from hpctrain.doctor.problems import problems
from hpctrain.job import Job
from hpctrain.launcher.started import without_launcher

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
MPI = MpiFacts(
    library="MPICH Version: 5.0.2", kind="mpich", standard="4.1", thread_level="MPI_THREAD_MULTIPLE", cuda_aware=False,
    cuda_how="the MPI library says that it is not CUDA-aware", mpiexec="/mpi/bin/mpiexec", mpiexec_kind="mpich",
    belongs=True, runs_with="/mpi/bin/mpiexec", srun_needs="pmi2",
)  # fmt: skip
VERSIONS = {"hpctrain": "0.1.0 (aa)", "torch": "2.8.0", "MPI": "MPICH"}


def healthy(nodes: int = 2, per_node: int = 4, cores: int = 8) -> Found:
    """Facts without a problem: ranks of a node share its cores, unbound."""
    ranks = [
        RankFacts(r, r // per_node, f"n{r // per_node}", list(range(cores)), cores // per_node, versions=dict(VERSIONS))
        for r in range(nodes * per_node)
    ]
    places = [
        NodeFacts(
            n, f"n{n}", list(range(n * per_node, (n + 1) * per_node)), cores, memory_total=64 * GIB,
            memory_free=60 * GIB, shm_total=32 * GIB, shm_free=32 * GIB,
        )
        for n in range(nodes)
    ]  # fmt: skip
    folders = [FolderFacts(n, "/scratch/runs", "xfs", "/dev/x", False, GIB * 99) for n in range(nodes)]
    measured = [Link((0, r), (0, r // per_node), 2.0, 8.0, 2**22) for r in range(1, nodes * per_node)]
    return Found(MPI, ranks, places, folders, measured, (12, 1))


def with_ranks(facts: Found, **changes: Any) -> Found:
    return replace(facts, ranks=[replace(rank, **changes) for rank in facts.ranks])


def with_nodes(facts: Found, **changes: Any) -> Found:
    return replace(facts, nodes=[replace(node, **changes) for node in facts.nodes])


def only(facts: Found) -> Problem:
    found = problems(facts)
    assert len(found) == 1, found
    return found[0]


def test_healthy_ranks_have_no_problems() -> None:
    assert problems(healthy()) == []
    assert "no problems found" in report.as_text(healthy(), [])


# -- GPU memory ------------------------------------------------------------------------------------------------
def with_gpus(**mpi: Any) -> Found:
    facts = healthy(1)
    ranks = [replace(rank, device=f"cuda:{rank.rank}", gpus=4) for rank in facts.ranks]
    return replace(facts, ranks=ranks, mpi=replace(MPI, **mpi))


def test_transport_of_gpu_memory_is_shown() -> None:
    facts = with_gpus(transport="ipc", transport_why="device buffers are summed through CUDA IPC (16 MiB in ipc 1 ms)")
    assert problems(facts) == []
    assert "GPUs       device buffers are summed through CUDA IPC" in report.as_text(facts, [])


def test_staging_is_a_note() -> None:
    problem = only(with_gpus(transport="staged", transport_why="device buffers are staged"))
    assert (problem.severity, problem.where) == ("note", "GPU memory")
    assert "pinned host memory (the MPI library says that it is not CUDA-aware)" in problem.what


def test_impossible_transport_is_an_error() -> None:
    trouble = 'communicator.device_transport = "nccl" cannot be used here: ranks 0 and 1 share a GPU; use "auto"'
    problem = only(with_gpus(transport_trouble=trouble))
    assert (problem.severity, problem.do) == ("error", 'use "auto"')
    assert problem.what.endswith("ranks 0 and 1 share a GPU")


# -- cores -----------------------------------------------------------------------------------------------------
def test_more_ranks_than_cores_warns_how_many_fit() -> None:
    problem = only(healthy(1, 4, 2))
    assert (problem.severity, problem.where) == ("warning", "node 0 (n0)")
    assert "4 ranks share 2 cores" in problem.what
    assert "at most 2 ranks" in problem.do


def test_ranks_bound_to_the_same_core_are_named() -> None:
    facts = healthy(1)
    places = [[0, 1], [3], [3], [4, 5]]
    bound = [replace(rank, cores=cores, threads=len(cores)) for rank, cores in zip(facts.ranks, places, strict=True)]
    problem = only(replace(facts, ranks=bound))
    assert "ranks 1-2 are bound to the same core 3" in problem.what


def test_bound_ranks_with_idle_cores_get_a_thread_count() -> None:
    facts = healthy(1)
    bound = [replace(rank, cores=[2 * rank.rank, 2 * rank.rank + 1], threads=1) for rank in facts.ranks]
    problem = only(replace(facts, ranks=bound))
    assert "ranks 0-3 would run 1 torch thread per rank, although each has 2 cores to itself" in problem.what
    assert problem.do == "set threads = 2 in the job"


def test_more_threads_than_cores_is_a_warning() -> None:
    problem = only(with_ranks(healthy(1), threads=4))
    assert "4 ranks would run 16 torch threads on 8 cores" in problem.what
    assert "threads = 2" in problem.do


def test_host_counted_as_several_nodes_by_mpi() -> None:
    facts = with_nodes(healthy(2, 4, 8), host="n0")
    problem = only(facts)
    assert problem.where == "n0"
    assert "counts it as 2 nodes" in problem.what
    assert "16 torch threads in total on 8 cores" in problem.what


def test_container_limited_to_fewer_cores_than_visible() -> None:
    problem = only(with_nodes(healthy(1), quota=2.0))
    assert "2 cores on average" in problem.what
    assert "8 threads" in problem.what


@pytest.mark.parametrize(("value", "shown"), [("8", "is 8, but each rank's share"), ("all", "a positive whole number")])
def test_omp_num_threads_set_badly(value: str, shown: str) -> None:
    problem = only(with_ranks(healthy(1), environment={"OMP_NUM_THREADS": value}))
    assert problem.where == "OMP_NUM_THREADS"
    assert shown in problem.what
    assert "OMP_NUM_THREADS=2" in problem.do


def test_omp_num_threads_equal_to_a_ranks_share_is_no_problem() -> None:
    assert problems(with_ranks(healthy(1), environment={"OMP_NUM_THREADS": "2"})) == []


def test_bound_threads_in_unbound_ranks() -> None:
    problem = only(with_ranks(healthy(1), environment={"OMP_PROC_BIND": "close"}))
    assert problem.where == "OMP_PROC_BIND"


# -- MPI, Slurm ------------------------------------------------------------------------------------------------
def test_mpiexec_of_another_library_on_the_path() -> None:
    mpi = replace(MPI, mpiexec="/usr/bin/mpiexec", mpiexec_kind="openmpi", belongs=False)
    problem = only(replace(healthy(), mpi=mpi))
    assert problem.severity == "warning"
    assert "/usr/bin/mpiexec" in problem.what
    assert "/mpi/bin/mpiexec" in problem.do


def test_broken_mpi_is_an_error_with_a_fix() -> None:
    problem = only(replace(healthy(1, 1), mpi=MpiFacts(troubles=["mpi4py cannot load it; install one"])))
    assert problem == Problem("error", "MPI", "mpi4py cannot load it", "install one")


def test_missing_launcher_is_an_error_alone_and_a_note_among_ranks() -> None:
    mpi = replace(MPI, mpiexec=None, runs_with=None, runs_not="no mpiexec of mpich found; install it")
    assert only(replace(healthy(1, 1), mpi=mpi)).severity == "error"
    assert only(replace(healthy(), mpi=mpi)).severity == "note"


GRANTED = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "2",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "shown", "do"),
    [
        ({"SLURM_NTASKS": "6"}, "SLURM_NTASKS is 6, but 8 ranks were started", "--ntasks=8"),
        ({"SLURM_JOB_NUM_NODES": "3"}, "3 nodes, but its ranks are on 2", "fewer nodes"),
        ({"SLURM_CPUS_PER_TASK": "16"}, "ranks 0-7 may use 8 cores", "srun --cpus-per-task=16"),
    ],
)
def test_slurm_grant_differs_from_started_ranks(change: dict[str, str], shown: str, do: str) -> None:
    assert problems(replace(healthy(), slurm=GRANTED)) == []
    problem = only(replace(healthy(), slurm={**GRANTED, **change}))
    assert shown in problem.what
    assert do in problem.do


def test_slurm_lacks_the_plugin_that_the_library_needs() -> None:
    assert problems(replace(healthy(), slurm=GRANTED, plugins=["none", "pmi2"])) == []
    problem = only(replace(healthy(), slurm=GRANTED, plugins=["none", "pmix_v4"]))
    assert "no --mpi=pmi2" in problem.what


def test_single_process_in_a_slurm_job_is_told_how_to_examine_all_ranks() -> None:
    problem = only(replace(healthy(1, 1), slurm={**GRANTED, "SLURM_JOB_NUM_NODES": "1"}))
    assert problem.severity == "note"
    assert "srun --mpi=pmi2 hpctrain doctor" in problem.do


@pytest.mark.parametrize(
    "text",
    ["MPI plugin types are...\n\tnone\n\tpmi2\n\tcray_shasta\n", "srun: MPI types are...\nsrun: none\nsrun: pmi2\n"],
)
def test_list_of_srun_plugins(text: str) -> None:
    assert {"none", "pmi2"} <= set(machine.plugins_in(text))
    assert not any(" " in name or "." in name for name in machine.plugins_in(text))


def test_pmix_versions_are_plugins_too() -> None:
    text = "MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4,pmix_v5\n"
    assert machine.plugins_in(text) == ["none", "pmix", "pmix_v4", "pmix_v5"]


def test_other_mpi_under_open_mpis_mpirun_is_detected_before_it_dies() -> None:
    ours = launcher.Library("openmpi", "Open MPI v5.0.11", "/x/libmpi.so")
    other = launcher.Library("mpich", "MPICH 5.0.2", "/y/libmpi.so")
    environment = {"OMPI_COMM_WORLD_SIZE": "1"}
    assert machine.launcher_mismatch(ours, environment) is None
    assert machine.launcher_mismatch(other, {}) is None
    assert "use the mpiexec that belongs" in (machine.launcher_mismatch(other, environment) or "")


# -- memory, devices, versions, folders ------------------------------------------------------------------------
def test_small_shared_memory_is_reported_with_the_largest_model() -> None:
    facts = with_nodes(healthy(1), shm_free=64 * 2**20)
    assert facts.nodes[0].shared_parameters == int(0.9 * 64 * 2**20 / (4 * 2 * 4))
    problem = only(facts)
    assert "64 MiB free" in problem.what
    assert "1.9 million parameters" in problem.what


def test_model_that_fits_shared_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is that of `why_not_shared`, which needs parameters and gradients of each rank."""
    code = (
        "import os; from mpi4py import MPI; from hpctrain.comm.mpi import shared\n"
        "from hpctrain.doctor.facts import NodeFacts\n"
        "status = os.statvfs('/dev/shm'); free = status.f_bavail * status.f_frsize\n"
        "fits = NodeFacts(0, 'n', [0], 1, shm_free=free).shared_parameters\n"
        "print(shared.why_not_shared(MPI.COMM_SELF, int(fits * 0.99) * 8) is None,\n"
        "      shared.why_not_shared(MPI.COMM_SELF, int(fits * 1.05) * 8) is None)"
    )
    clean = without_launcher(os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_ranks_that_cannot_share_memory() -> None:
    problem = only(with_nodes(healthy(1), not_shared="/dev/shm cannot be read; give it"))
    assert (problem.severity, problem.do) == ("warning", "give it")


def test_gpus_on_some_ranks_only_is_an_error() -> None:
    facts = healthy()
    ranks = [replace(rank, device="cuda:0", gpus=1) if rank.rank < 4 else rank for rank in facts.ranks]
    found = problems(replace(facts, ranks=ranks))
    assert (found[0].severity, found[0].where) == ("error", "ranks 4-7")


def test_shared_and_idle_gpus() -> None:
    shared = problems(with_ranks(healthy(1), device="cuda:0", gpus=1))
    assert any("ranks 0-3 compute on the same GPU" in problem.what for problem in shared)
    idle = problems(with_ranks(healthy(1, 1), device="cuda:0", gpus=4, threads=8))
    assert any("3 GPUs would be idle" in problem.what for problem in idle)


def test_gpu_not_usable_by_this_torch() -> None:
    problem = only(with_nodes(healthy(1), nvidia=2))
    assert "2 GPUs, but this torch is built without CUDA" in problem.what


@pytest.mark.parametrize(("name", "severity"), [("hpctrain", "error"), ("MPI", "error"), ("torch", "warning")])
def test_differing_versions_are_reported_with_their_ranks(name: str, severity: str) -> None:
    facts = healthy()
    other = replace(facts.ranks[5], versions={**VERSIONS, name: "other"})
    problem = only(replace(facts, ranks=[*facts.ranks[:5], other, *facts.ranks[6:]]))
    assert (problem.severity, problem.where) == (severity, name)
    assert "other on rank 5" in problem.what


def test_node_local_output_folder_is_an_error() -> None:
    facts = healthy()
    problem = only(replace(facts, folders=[facts.folders[0], replace(facts.folders[1], seen=False)]))
    assert problem.severity == "error"
    assert "node 1 (n1) does not see what rank 0 writes" in problem.what


def test_unwritable_folder_is_an_error() -> None:
    facts = healthy(1)
    problem = only(replace(facts, folders=[replace(facts.folders[0], trace="no room; make some")]))
    assert (problem.severity, problem.do) == ("error", "make some")


def test_network_file_system_and_missing_locks_are_notes() -> None:
    facts = healthy(1)
    folder = replace(facts.folders[0], network=True, type="nfs4", locking="errno 524")
    found = problems(replace(facts, folders=[folder]))
    assert [problem.severity for problem in found] == ["note", "note"]
    assert any("HDF5_USE_FILE_LOCKING=FALSE" in problem.do for problem in found)


# -- messages --------------------------------------------------------------------------------------------------
def with_links(within: float, between: float, latency: float = 30.0) -> list[Link]:
    found = [Link((0, r), (0, 0), 1.0, within, 2**22) for r in (1, 2, 3)]
    return [*found, Link((0, 4), (0, 1), latency, between, 2**22)]


def test_slow_links_between_nodes() -> None:
    assert problems(replace(healthy(), links=with_links(8, 1.0))) == []
    assert "12 MB/s" in only(replace(healthy(), links=with_links(8, 0.012))).what


def test_unused_infiniband() -> None:
    facts = with_ranks(with_nodes(healthy(), infiniband=["mlx5_0"]), environment={"RDMAV_FORK_SAFE": "1"})
    assert problems(replace(facts, links=with_links(8, 12.0, 2.0))) == []
    assert "mlx5_0" in only(replace(facts, links=with_links(8, 1.0))).what


def test_pair_slower_than_similar_pairs_is_named() -> None:
    links = with_links(8, 1.0)
    links[1] = replace(links[1], bandwidth_gb_s=0.5)
    assert only(replace(healthy(), links=links)).where == "ranks 0, 2 (n0)"


def test_open_mpi_without_yielding_and_more_ranks_than_cores() -> None:
    facts = replace(healthy(1, 4, 2), mpi=replace(MPI, kind="openmpi"))
    assert any("mpi_yield_when_idle=1" in problem.do for problem in problems(facts))
    yielding = with_ranks(facts, environment={"OMPI_MCA_mpi_yield_when_idle": "1"})
    assert len(problems(yielding)) == 1


def test_measurements_over_virtual_ranks_match_their_network() -> None:
    network = LinkNetwork(latency=30_000, bandwidth=1e9, node_latency=2_000, node_bandwidth=4e9)
    world = World(6, nodes=[0, 0, 0, 1, 1, 1], network=network)
    results = world.run(lambda comm: links.measure(comm, lambda text: None))
    measured, pairs = results[0]
    assert all(result == results[0] for result in results)
    assert pairs == (6, 1)
    assert [link.ranks for link in measured] == [(0, 1), (0, 2), (0, 3), (1, 2), (3, 4), (3, 5), (4, 5)]
    for link in measured:
        assert link.latency_us == pytest.approx(2.0 if link.within else 30.0, rel=0.01)
        assert link.bandwidth_gb_s == pytest.approx(4.0 if link.within else 1.0, rel=0.02)


@pytest.mark.parametrize("bandwidth", [1.25e6, 1.25e5])
def test_slow_link_is_measured_with_less_data(bandwidth: float) -> None:
    world = World(2, nodes=[0, 1], network=LinkNetwork(bandwidth=bandwidth))
    ((link,), _) = world.run(lambda comm: links.measure(comm, lambda text: None))[0]
    assert link.nbytes < 2**20
    assert link.bandwidth_gb_s == pytest.approx(bandwidth / 1e9, rel=0.1)
    assert world.time < 5e9


def test_few_pairs_are_measured_for_any_number_of_ranks() -> None:
    rounds, between, pairs = links.pairs_of([node for node in range(64) for _ in range(32)])
    assert len(rounds) + len(between) <= links.MOST_WITHIN + links.MOST_BETWEEN
    assert pairs == (64 * 32 * 31 // 2, 64 * 63 // 2)
    for turn in rounds:
        ranks = [rank for pair in turn for rank in pair]
        assert len(set(ranks)) == len(ranks)
    assert all(low // 32 != high // 32 for low, high in between)


# -- a job -----------------------------------------------------------------------------------------------------
def test_job_is_checked_against_the_ranks() -> None:
    job = Job.load(ROOT / "jobs/digits.toml")
    facts = World(3).run(lambda comm: gather.look_at_job(comm, job, "digits.toml"))[0]
    assert facts.troubles == []
    assert facts.phases[0]["workers"] == [0, 1, 2]
    assert facts.parameters > 0
    assert facts.samples is not None


def test_job_with_unsuitable_ranks_or_no_data_is_an_error(tmp_path: Path) -> None:
    for override, shown in (("ranks=4", "ranks = 4"), ("data={name='mnist', path='/nowhere'}", "/nowhere")):
        job = Job.load(ROOT / "jobs/digits.toml", [override])
        facts = World(2).run(partial(gather.look_at_job, job=job, path="digits.toml"))[0]
        assert any(shown in trouble for trouble in facts.troubles)
        found = problems(replace(healthy(), job=facts))
        assert {problem.severity for problem in found} == {"error"}


def test_job_whose_arenas_exceed_shared_memory() -> None:
    job = JobFacts("big.toml", "runs", nbytes=6 * GIB, arenas=4, parameters=1)
    whats = [problem.what for problem in problems(replace(healthy(1), job=job))]
    assert any("49,152 MiB, but /dev/shm has 32,768 MiB" in what for what in whats)
    assert any("98,304 MiB" in what for what in whats)


# -- reading a machine -----------------------------------------------------------------------------------------
def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cgroup_v2_limits_of_parent_groups_apply(tmp_path: Path) -> None:
    root = plant(tmp_path, {
        "proc/self/cgroup": "0::/slurm/job_7\n",
        "sys/fs/cgroup/slurm/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/slurm/job_7/cpu.max": "max 100000\n",
        "sys/fs/cgroup/slurm/job_7/memory.max": "1073741824\n",
    })  # fmt: skip
    assert machine.cpu_quota(root) == 2.5
    assert machine.memory_limit(root) == GIB


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    root = plant(tmp_path, {
        "proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert machine.cpu_quota(root) == 1.5
    assert machine.memory_limit(root) is None


def test_folder_belongs_to_the_innermost_mount(tmp_path: Path) -> None:
    mounts = plant(tmp_path, {"mounts": (
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:5 / {tmp_path}/my\\040data rw - nfs4 server:/data rw\n"
    )}) / "mounts"  # fmt: skip
    assert machine.filesystem(tmp_path / "my data/runs", mounts) == ("nfs4", "server:/data")
    assert machine.filesystem(tmp_path / "mine", mounts) == ("ext4", "/dev/sda")


def test_checking_the_output_folder_leaves_nothing_there(tmp_path: Path) -> None:
    facts = World(2, nodes=[0, 1]).run(lambda comm: gather.look_at_output(comm, tmp_path / "runs"))[0]
    assert [(folder.seen, folder.trace, folder.locking) for folder in facts] == [(True, None, None)] * 2
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_folder_is_detected() -> None:
    # No user, not even root, can create a file there.
    (facts,) = World(1).run(lambda comm: gather.look_at_output(comm, Path("/proc/self")))[0]
    assert facts.trace is not None


def test_ranges_of_ranks() -> None:
    assert ranges([0, 1, 2, 3, 7]) == "0-3, 7"


# -- output ---------------------------------------------------------------------------------------------------
def test_report_lists_each_problem_with_a_fix() -> None:
    facts = with_nodes(healthy(), shm_free=64 * 2**20)
    text = report.as_text(facts, problems(facts))
    assert "8 ranks on 2 nodes" in text
    assert text.count("-> give the node or container more") == 2
    assert "2 warnings" in text
    assert max(map(len, text.splitlines())) <= 120


def test_latencies_of_napping_ranks_are_explained() -> None:
    assert "nap" in report.as_text(healthy(1, 4, 2), [])
    assert "nap" not in report.as_text(healthy(1, 4, 8), [])


def test_json_is_plain_and_complete() -> None:
    facts = replace(healthy(1, 4, 2), slurm=GRANTED, job=JobFacts("x", "runs"))
    shown = json.loads(report.as_json(facts, problems(facts)))
    assert set(shown) == {"facts", "problems"}
    assert set(shown["problems"][0]) == {"severity", "where", "what", "do"}
    assert shown["facts"]["ranks"][3]["cores"] == [0, 1]
    assert shown["facts"]["nodes"][0]["shared_parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-n", "0"], "at least 1 rank"),
        (["train.epochs=1"], "--job"),
        (["-n", "2", "--job", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert shown in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


# -- the guard -------------------------------------------------------------------------------------------------
GUARDED = """
import ctypes, os, sys, time
from hpctrain.doctor.guard import Guard
guard = Guard("rank 3 on n1", reports=True, slow=0.2, limit=0.8)
guard.stage("importing torch")
{body}
guard.close()
"""
HANG = "guard.stage('starting MPI'); ctypes.PyDLL(None).sleep(60)  # holds the interpreter, as MPI_Init does"


@pytest.fixture
def guarded() -> Callable[[str], subprocess.CompletedProcess[str]]:
    def run(body: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", GUARDED.format(body=body)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)

    return run


def test_only_slow_stages_are_reported(guarded: Any) -> None:
    done = guarded("time.sleep(0.5); guard.stage('quick')")
    assert (done.returncode, done.stderr) == (0, "hpctrain doctor: importing torch ...\n")


def test_hanging_process_is_ended_and_reports_its_stage(guarded: Any) -> None:
    start = time.monotonic()
    done = guarded(HANG)
    assert done.returncode == -9
    assert "rank 3 on n1 was still starting MPI after 1 s" in done.stderr
    assert time.monotonic() - start < 20


def test_dying_process_is_reported(guarded: Any) -> None:
    done = guarded("guard.stage('starting MPI'); os._exit(16)")
    assert done.returncode == 16
    assert "rank 3 on n1 died while starting MPI" in done.stderr
