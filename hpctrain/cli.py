"""The `hpctrain` command. Imports torch and MPI only in the commands that need them."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpctrain import __version__
from hpctrain.commandline import check_alone, job_arguments, job_file, load, named, parse, resume_arguments
from hpctrain.errors import HpctrainError
from hpctrain.launcher.program import find_program
from hpctrain.text import escaped, shown_path

DESCRIPTION = "Train PyTorch models on MPI and Slurm clusters with the synchronisation strategy that is fastest there."
EXPORT = "trace export"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
RUN = "%(prog)s [-n N] [--resume [RUN]] [--reset-optimizer] JOB [key=value ...]\n       %(prog)s [-n N] -- PROGRAM ..."
SHOW = (
    "Check a job file and print it with every default written out. Nothing that the job names is imported: the options "
    "of your own strategies and rules are printed as given; `hpctrain doctor --job FILE` also checks those."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for a user's mistake, 130 after an interruption.

    1: `doctor` found a problem that keeps a run from working, or `test-strategy` found a broken promise.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == EXPORT.split():  # a command of two words; `trace RUN` also exists
        words[:2] = [EXPORT]
    if sys.stdout is None:  # closed by the parent process
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        with _written_out():
            options = parse(_parser(), words)
            return int(options.command(options))
    except HpctrainError as error:
        print(f"hpctrain: {escaped(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 1


@contextmanager
def _written_out() -> Iterator[None]:
    """On exit, flush all output. Raises HpctrainError if it cannot be written, for example on a full disk."""
    try:
        try:
            yield
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:  # an error of some file, not of stdout
            raise
        _discard_output()
        raise HpctrainError(f"standard output cannot be written ({error.strerror})") from None


def _discard_output() -> None:
    """Discard output that could not be written, so that Python reports no error when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    from hpctrain.bench import CHOICES
    from hpctrain.vision.arguments import add_predict
    from hpctrain.vision.caption_command import add_captions

    parser = argparse.ArgumentParser(prog="hpctrain", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hpctrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a job on the ranks that mpirun or srun started (or on one)")
    job_arguments(train)
    resume_arguments(train)
    train.set_defaults(command=_train)
    run = commands.add_parser(
        "run", help="start ranks on this machine, of a job or of your own program (finds the right mpiexec)", usage=RUN,
        description="Start ranks of a job, or of a program of your own (-- python train.py), with the mpiexec that "
        "belongs to mpi4py's MPI. After --, plain `python` is the Python that hpctrain is installed in.",
    )  # fmt: skip
    run.add_argument("-n", type=int, default=2, metavar="N", help="how many ranks (default 2)")
    job_arguments(run)
    resume_arguments(run)
    run.set_defaults(command=_run, program=None)
    evaluate = commands.add_parser("evaluate", help="compute loss and metric of a run's model on its test samples")
    evaluate.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    evaluate.set_defaults(command=_evaluate)
    _add_reading(commands)
    bench = commands.add_parser("bench", help="measure this machine: all-reduce, steps, switches, virtual ranks ...")
    bench.add_argument("what", nargs="?", default="all", choices=CHOICES)
    bench.add_argument("-n", type=int, metavar="N", help="how many ranks to start (default 2, or all of --cluster)")
    bench.add_argument(
        "--cluster", metavar="FILE", type=Path, help="on hosts of that cluster, built on this machine (hpctrain lab)"
    )
    bench.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    bench.add_argument("--csv", metavar="FILE", help="also write every measured value to FILE, one per line")
    bench.add_argument("--plot", metavar="FILE", help="also draw the comparisons with their intervals, as PNG")
    bench.set_defaults(command=_bench)
    doctor = commands.add_parser("doctor", help="check ranks, MPI, nodes and network, and advise on problems")
    doctor.add_argument("-n", type=int, metavar="N", help="start N ranks on this machine and check those")
    doctor.add_argument("--json", action="store_true", help="print one JSON object: the facts and the problems found")
    doctor.add_argument("--job", metavar="FILE", help="also check whether this job would run")
    doctor.add_argument("overrides", metavar="key=value", nargs="*", help="keys of that job to change")
    doctor.set_defaults(command=_doctor)
    test = commands.add_parser("test-strategy", help="test a strategy against every promise that it must keep")
    test.add_argument("name", metavar="NAME", help="as in a job: all_reduce, or my_module:MyStrategy")
    test.add_argument("options", metavar="key=value", nargs="*", help="its options (default: each set that it lists)")
    test.set_defaults(command=_test_strategy)
    _add_lab(commands)
    _add_simulator(commands)
    _add_ingest(commands)
    add_predict(commands)
    add_captions(commands)
    job = commands.add_parser("job", help="show and explain job files")
    about = job.add_subparsers(required=True, metavar="ACTION")
    explain = about.add_parser("explain", help="list every key of a job with its type, default and meaning")
    explain.add_argument("key", nargs="?", default="", help="only keys that begin with this")
    explain.add_argument("--markdown", action="store_true", help="print the table of docs/job.md")
    explain.set_defaults(command=_explain)
    show = about.add_parser(
        "show", help="print a job with every default written out, and import nothing that it names", description=SHOW
    )
    job_arguments(show)
    show.set_defaults(command=_show)
    return parser


def _add_lab(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that build several hosts on this machine."""
    lab = commands.add_parser("lab", help="several hosts on this machine, with limited networks and processors")
    actions = lab.add_subparsers(required=True, metavar="ACTION")
    texts = {
        "up": "build the cluster; it stays until `hpctrain lab down`",
        "run": "start a command on ranks of its hosts; builds it for that time unless it is up",
        "check": "measure its links (iperf3) and processor shares",
    }
    made = {name: actions.add_parser(name, help=text) for name, text in texts.items()}
    for action in made.values():
        action.add_argument("--cluster", metavar="FILE", type=Path, required=True, help="such as clusters/lan2.toml")
    made["run"].add_argument("-n", type=int, metavar="N", help="how many ranks (default: all places of the hosts)")
    made["run"].add_argument("words", metavar="COMMAND", nargs="+", help="put -- before it")
    made["up"].set_defaults(command=_lab_up)
    made["run"].set_defaults(command=_lab_run)
    made["check"].set_defaults(command=_lab_check)
    down = actions.add_parser("down", help="remove the hosts, also what a killed lab has left")
    down.set_defaults(command=_lab_down)


def _add_simulator(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that predict."""
    simulate = commands.add_parser("simulate", help="predict what a job does on a described cluster, without it")
    job_arguments(simulate)
    simulate.add_argument("--cluster", metavar="FILE", type=Path, required=True, help="such as clusters/lan1g.toml")
    simulate.add_argument("-n", type=int, metavar="N", help="how many ranks (default: all places of the hosts)")
    simulate.add_argument(
        "--calibration", metavar="FILE", type=Path, help="what computing costs (default: measured here, in seconds)"
    )
    simulate.add_argument("--learn", action="store_true", help="also compute gradients: loss against simulated seconds")
    simulate.add_argument(
        "--curve", metavar="RUN", type=Path, help="the run folder whose losses and evaluations the job's rules observe"
    )
    simulate.add_argument("--steps", type=int, metavar="N", help="rounds (default: enough to see what a step costs)")
    simulate.set_defaults(command=_simulate)
    calibrate = commands.add_parser(
        "calibrate", help="find out what a job's steps and messages cost, for `hpctrain simulate`"
    )
    calibrate.add_argument(
        "overrides", metavar="RUN", nargs="*",
        help="folders of real runs of one model, with different strategies if possible; with --measure: keys to "
        "change, such as train.batch_size=32",
    )  # fmt: skip
    calibrate.add_argument("--measure", dest="job", metavar="JOB", help="instead measure steps of this job here")
    calibrate.add_argument(
        "--cluster", metavar="FILE", type=Path, help="where the runs were; with --measure: how its ranks lie on hosts"
    )
    calibrate.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("calibration.toml"))
    calibrate.set_defaults(command=_calibrate)


def _add_ingest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command that makes a data set."""
    ingest = commands.add_parser("ingest", help="make one HDF5 file of pictures and annotations, with many processes")
    ingest.add_argument("kind", choices=("voc", "captions", "folder"), help="how they lie in SRC: see docs/ingest.md")
    ingest.add_argument("source", metavar="SRC", type=Path, help="the folder of the data set")
    ingest.add_argument("out", metavar="OUT.h5", type=Path, help="the file to make")
    ingest.add_argument(
        "-n", type=int, metavar="N", help="processes that read (default: one per core); under mpirun, ranks do"
    )
    ingest.add_argument("--size", type=int, default=256, metavar="PIXELS", help="both sides of a picture (default 256)")
    ingest.add_argument(
        "--fit", default="pad", metavar="pad|stretch",
        help="pad (default): keep the aspect ratio, black on the right or below; stretch: do not keep it",
    )  # fmt: skip
    ingest.add_argument("--classes", metavar="A,B,...", help="the classes, in this order (default: all, sorted)")
    ingest.add_argument("--strict", action="store_true", help="end at the first problem instead of listing it")
    ingest.set_defaults(command=_ingest)


def _add_reading(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that read traces."""
    report = commands.add_parser("report", help="write report.html: timeline, waiting, efficiency, convergence ...")
    report.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    report.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: report.html in the run folder")
    report.set_defaults(command=_report)
    compare = commands.add_parser("compare", help="compare runs: time to a loss, speed, cost, scaling")
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    compare.add_argument("--baseline", metavar="RUN", type=Path, help="show speed-up and scaling efficiency against it")
    compare.add_argument("--target-loss", type=float, metavar="X", help="target loss (default: what all runs reached)")
    compare.add_argument("--target-metric", type=float, metavar="X", help="target metric (default: likewise)")
    compare.add_argument("--csv", metavar="FILE", type=Path, help="write the table to FILE, with units in its columns")
    compare.add_argument("-o", "--output", metavar="FOLDER", type=Path, help="write plots to FOLDER")
    compare.set_defaults(command=_compare)
    watch = commands.add_parser("watch", help="follow a run while it trains: loss, speed, waiting, time left")
    watch.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between updates (default 2)")
    watch.add_argument("--once", action="store_true", help="print the current state and exit")
    watch.set_defaults(command=_watch)
    trace = commands.add_parser("trace", help="show where a run's time went: totals per rank and span kind")
    trace.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    trace.set_defaults(command=_trace)
    export = commands.add_parser(EXPORT, help="write a run's traces for Perfetto, or as tables")
    export.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    export.add_argument("--format", default="perfetto", metavar="perfetto|csv|parquet", help="default: perfetto")
    export.add_argument("-o", "--output", type=Path, metavar="PATH", help="default: in the run folder")
    export.add_argument("--ranks", metavar="0,3,8-15", help="only these ranks")
    export.add_argument("--steps", metavar="FIRST:LAST", help="only the time of these steps, both included")
    export.set_defaults(command=_export)


def _train(options: argparse.Namespace) -> int:
    from hpctrain.run.command import main

    status = main(lambda: load(options))
    try:
        sys.stdout.flush()
    except OSError:  # already reported, and harmless: the run's results are in its folder
        _discard_output()
    return status


def _run(options: argparse.Namespace) -> int:
    from hpctrain import launcher
    from hpctrain.launcher.mpiexec import LibraryQuery

    if options.program is not None:
        check_alone(options)
        program = find_program(options.program)
        asked = LibraryQuery(program.python)
        if program.note:
            print(f"hpctrain run: {program.note}", file=sys.stderr)
        return launcher.run(options.n, program.command, asked=asked)
    job_file(options)  # rank 0 reports mistakes in the file: to read it here as well would delay the ranks by 0.3 s
    asked = LibraryQuery()
    command = [sys.executable, "-m", "hpctrain", "train"]
    command += [*([options.job] if options.job is not None else []), *options.overrides]
    if options.resume is not None:
        command += [f"--resume={options.resume}"]
    if options.reset_optimizer:
        command += ["--reset-optimizer"]
    return launcher.run(options.n, command, asked=asked)


def _evaluate(options: argparse.Namespace) -> int:
    from hpctrain.run.command import evaluate_run

    print("\n".join(evaluate_run(options.run)))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from hpctrain.trace import open_run
    from hpctrain.trace.totals import format_totals

    print(format_totals(open_run(options.run)))
    return 0


def _export(options: argparse.Namespace) -> int:
    from hpctrain.views.export import export_run, parse_ranks, parse_steps

    ranks = parse_ranks(options.ranks) if options.ranks is not None else None
    steps = parse_steps(options.steps) if options.steps is not None else None
    print(f"wrote {shown_path(export_run(options.run, options.format, options.output, ranks, steps))}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from hpctrain.views.report import write_report

    path, headline = write_report(options.run, options.output)
    print(f"{headline}\nwrote {shown_path(path)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hpctrain.views import compare

    return compare.main(
        options.runs, options.baseline, options.target_loss, options.target_metric, options.csv, options.output
    )


def _watch(options: argparse.Namespace) -> int:
    from hpctrain.views.watch import watch

    return watch(options.run, options.every, options.once)


def _simulate(options: argparse.Namespace) -> int:
    from hpctrain.job import Job
    from hpctrain.simulate import command

    job = Job.load(named(options.job), options.overrides)
    return command.simulate(
        job, options.cluster, options.n, options.calibration, options.learn, options.steps, options.curve
    )


def _calibrate(options: argparse.Namespace) -> int:
    from hpctrain.job import Job
    from hpctrain.simulate import command

    if options.job is not None:
        return command.calibrate_here(Job.load(options.job, options.overrides), options.cluster, options.output)
    if not options.overrides:
        raise HpctrainError(
            "hpctrain calibrate needs folders of runs, such as runs/mnist-20261129-120000, or --measure JOB"
        )
    return command.calibrate_from([Path(word) for word in options.overrides], options.cluster, options.output)


def _ingest(options: argparse.Namespace) -> int:
    from hpctrain.ingest.command import Ingestion, main

    classes = None if options.classes is None else tuple(name.strip() for name in options.classes.split(","))
    return main(Ingestion(options.kind, options.source, options.out, options.n, options.size, options.fit, classes,
                        options.strict))  # fmt: skip


def _lab_up(options: argparse.Namespace) -> int:
    from hpctrain.lab import command

    return command.up(options.cluster)


def _lab_run(options: argparse.Namespace) -> int:
    from hpctrain.lab import command

    return command.run(options.cluster, options.words, options.n)


def _lab_check(options: argparse.Namespace) -> int:
    from hpctrain.lab import command

    return command.look(options.cluster)


def _lab_down(options: argparse.Namespace) -> int:
    from hpctrain.lab import command

    return command.down()


def _bench(options: argparse.Namespace) -> int:
    from hpctrain import bench, launcher

    outputs = bench.Outputs(options.json, options.csv, options.plot)
    if options.cluster is None and not bench.needs_ranks(options.what, os.environ):
        return bench.main(options.what, outputs)
    outputs.check()
    command = [sys.executable, "-m", "hpctrain", "bench", options.what, *outputs.arguments()]
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # of warnings about hosts without a name server
    if options.cluster is None:
        return launcher.run(2 if options.n is None else options.n, command, environment=quiet)
    from hpctrain.lab import command as lab

    return lab.run(options.cluster, command, options.n, {bench.THREADS: "1", **os.environ, **quiet})


def _doctor(options: argparse.Namespace) -> int:
    from hpctrain import doctor, launcher
    from hpctrain.errors import ClusterError
    from hpctrain.job import Job
    from hpctrain.launcher.started import launched_rank, launched_size

    if options.overrides and options.job is None:
        raise HpctrainError(f"{options.overrides[0]}: this changes a key of a job; name the job file with --job")
    if options.n is not None:
        launched, by = launched_size(os.environ)
        if launched > 1:
            from hpctrain.comm.connect import report

            mistake = HpctrainError(f"-n {options.n}: {by} has already started {launched} ranks; leave -n out")
            return report(mistake, launched_rank(os.environ))
        if options.job is not None:
            Job.load(options.job, options.overrides)  # report a mistake in it before any rank is started
        command = [sys.executable, "-m", "hpctrain", "doctor", *(["--json"] if options.json else [])]
        command += [f"--job={options.job}", *options.overrides] if options.job is not None else []
        try:
            return launcher.run(options.n, command)
        except ClusterError:
            if options.n < 1:
                raise  # else there is no launcher: the problem is reported below
    load = (lambda: Job.load(options.job, options.overrides)) if options.job is not None else None
    return doctor.main(options.json, options.job, load)


def _test_strategy(options: argparse.Namespace) -> int:
    from hpctrain.conformance.command import main as test_strategy

    return test_strategy(options.name, options.options)


def _explain(options: argparse.Namespace) -> int:
    from hpctrain.job.explain import as_markdown, as_text, explain

    rows = [row for row in explain() if row.key.startswith(options.key)]
    print((as_markdown(rows) if options.markdown else as_text(rows)).rstrip("\n"))
    return 0


def _show(options: argparse.Namespace) -> int:
    from hpctrain.job import Job

    job = Job.recorded(named(options.job), options.overrides)
    print(job.dump(), end="")
    for key in job.unchecked:
        print(f"note: {key} is not built in and was not imported, so its options are not checked", file=sys.stderr)
    return 0
