"""Every registered strategy passes every check on four real ranks, with one set of options."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.conformance import CHECKS, Check, Subject, over_real_ranks, registered
from tests.helpers_mpi import Join

pytestmark = pytest.mark.mpi
SUBJECTS = registered()
EVERYWHERE = ("equals one process", "stops on a NaN loss", "resumes bit for bit")


def _place(subject: Subject) -> int:
    """The index of the options among those that the strategy is tested with."""
    return [other for other in SUBJECTS if other.name == subject.name].index(subject)


CASES = [
    (subject, check)
    for subject in SUBJECTS
    for check in CHECKS
    if _place(subject) == 0 or check is CHECKS[0] or (_place(subject) == 1 and check.name in EVERYWHERE)
]


def _name(value: Subject | Check) -> str:
    return value.label if isinstance(value, Subject) else value.name


@pytest.mark.parametrize(("subject", "check"), CASES, ids=_name)
def test_strategy_passes_check(join: Join, folder: Path, subject: Subject, check: Check) -> None:
    comm = join()
    if comm.size != 4 and check.name not in EVERYWHERE:
        pytest.skip("this check runs on 4 ranks only: equality and resuming cover other numbers")
    verdict = over_real_ranks(subject, check, comm, folder)
    if verdict.left_out is not None:
        pytest.skip(verdict.left_out)
    assert verdict.broken is None
