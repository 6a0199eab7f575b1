"""What commands that take a job share: the job file and the keys to change, which may stand anywhere among options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpctrain.errors import JobError
from hpctrain.filenames import JOB, LATEST

if TYPE_CHECKING:
    from hpctrain.job import Job
    from hpctrain.run.resume import Resume

HERE = "here"  # --resume without a folder


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Like `parser.parse_args`, but `key=value` may also stand before the job file and after options."""
    options, rest = parser.parse_known_args(words)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "overrides" not in options:
        return options
    given = [*options.overrides, *rest]
    if "job_is_word" in options:
        given = [word for word in (options.job, *given) if word is not None]
        place = next((place for place, word in enumerate(given) if not _is_override(word)), None)
        options.job = None if place is None else given.pop(place)
    if _is_override(getattr(options, "resume", None) or ""):  # `JOB --resume key=value`
        given.append(options.resume)
        options.resume = HERE
    options.overrides = given
    return options


def _is_override(word: str) -> bool:
    return "=" in word and not os.path.exists(word)


def job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a job file, and keys to change in it."""
    parser.add_argument("job", metavar="JOB", nargs="?", help="a job file (TOML)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change, such as train.epochs=3")
    parser.set_defaults(job_is_word=True)


def named(path: str | None) -> str:
    """The given job file. Raises JobError if none was given."""
    if path is None:
        raise JobError("no job file given; name one, such as jobs/digits.toml")
    return path


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that continue an earlier run."""
    parser.add_argument(
        "--resume",
        nargs="?",
        const=HERE,
        metavar="RUN",
        help="continue from the newest checkpoint of that run folder (leave JOB out, or give the run's own); without "
        "RUN: of the folder that contains JOB; `latest`: of the newest unfinished run with an equal job in this Slurm "
        "job (outside Slurm: among runs started outside Slurm), or start a new run if there is none",
    )
    parser.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="with --resume: reset the optimizer's state (momentum, Adam's moments); required if the optimizer changes",
    )


def job_file(options: argparse.Namespace) -> str:
    """The job file that the options name, or mean by `--resume RUN`. Raises JobError."""
    resume, path = options.resume, options.job
    if path is None and resume not in (None, HERE, LATEST):
        path = os.path.join(resume, JOB)
    path = named(path)
    if resume is None and options.reset_optimizer:
        raise JobError("--reset-optimizer: there is nothing to reset without --resume RUN")
    return path


def load(options: argparse.Namespace) -> tuple[Job, Resume | None]:
    """The job, and what to resume from, if anything."""
    from hpctrain.job import Job
    from hpctrain.run.resume import Resume

    path, resume = job_file(options), options.resume
    job = Job.load(path, options.overrides)
    if resume is None:
        return job, None
    optimizer: Literal["keep", "reset"] = "reset" if options.reset_optimizer else "keep"
    if resume == LATEST:
        return job, Resume(LATEST, optimizer=optimizer)
    folder = Path(path).parent if resume == HERE else Path(resume)
    own = os.path.exists(folder / JOB) and os.path.samefile(path, folder / JOB)
    return job, Resume(folder, "take" if own else "refuse", optimizer)  # changes to the run's own job are intended


def feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hpctrain features`."""
    parser.add_argument("captions", metavar="CAPTIONS.h5", type=Path, help="made by `hpctrain ingest captions`")
    parser.add_argument("out", metavar="OUT.h5", type=Path, help="the file to make")
    parser.add_argument(
        "--backbone", default="efficientnet_lite0", metavar="NAME", help="efficientnet_lite0 (default) or vgg16"
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help=_WEIGHTS)
    parser.add_argument(
        "-n", type=int, metavar="N", help="processes that compute (default: one per core); under mpirun, ranks do"
    )


def caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hpctrain caption`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path)
    parser.add_argument("--beam", type=int, default=3, metavar="WIDTH", help="of the search; 1: greedy (default 3)")
    parser.add_argument("--weights", metavar="FILE", type=Path, help=_WEIGHTS)


_WEIGHTS = "the net's weights (default: those of its package)"
