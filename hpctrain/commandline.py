"""What commands that take a job share: the job file and the keys to change, which may stand anywhere among options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpctrain.errors import JobError
from hpctrain.filenames import JOB, LATEST
from hpctrain.launcher.program import EXAMPLE, looks_like_program
from hpctrain.text import shown, shown_path

if TYPE_CHECKING:
    from hpctrain.job import Job
    from hpctrain.run.resume import Resume

HERE = "here"  # --resume without a folder


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Like `parser.parse_args`, but `key=value` may also stand before the job file and after options.

    `hpctrain run ... -- PROGRAM ...`: `program` gets the words after the first `--`, or None without one.
    """
    own = list(words).index("--") if words[:1] == ["run"] and "--" in words else len(words)
    options, rest = parser.parse_known_args(words[:own])
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        program = "program" in options and looks_like_program(options.job or "")
        hint = f"; put -- before a program of your own: {EXAMPLE}" if program else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if own < len(words):
        options.program = words[own + 1 :]
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
    if looks_like_program(path):
        raise JobError(f"{shown_path(path)} is not a job file (TOML); put -- before a program of your own: {EXAMPLE}")
    if resume is None and options.reset_optimizer:
        raise JobError("--reset-optimizer: there is nothing to reset without --resume RUN")
    return path


def check_alone(options: argparse.Namespace) -> None:
    """Raises JobError if keys or a job were given beside a program after `--`."""
    program = f"the program after -- ({shown(' '.join(options.program))})"
    if options.job is not None:
        raise JobError(f"{shown_path(options.job)}: give either a job file or {program}")
    if options.overrides:
        raise JobError(f"{shown(options.overrides[0])}: {program} sets the keys of its job itself")
    if options.resume is not None or options.reset_optimizer:
        option = "--reset-optimizer" if options.resume is None else "--resume"
        raise JobError(
            f"{option} is for job files; {program} says itself what it resumes, such as "
            'hpctrain.train(job, resume="latest")'
        )


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
