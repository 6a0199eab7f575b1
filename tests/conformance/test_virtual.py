"""Every registered strategy passes every check, over virtual ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.conformance import CHECKS, Check, Nodes, Subject, over_virtual_ranks, registered, why_left_out, worlds
from tests.marks import mostly_slow

Case = tuple[Subject, Check, Nodes]
SUBJECTS = registered()
CASES: list[Case] = [
    (subject, check, nodes)
    for subject in SUBJECTS
    for check in CHECKS
    for nodes in worlds(subject, check)
    if why_left_out(subject, check, nodes) is None
]
NAMES = [subject.name for subject in SUBJECTS]
FIRST = [subject for place, subject in enumerate(SUBJECTS) if NAMES.index(subject.name) == place]


def _is_quick(case: Case) -> bool:
    """All checks on two nodes for the first set of options of each strategy."""
    subject, _, nodes = case
    return subject in FIRST and len(nodes) == 4


def _name(value: Any) -> str:
    if isinstance(value, Subject):
        return value.label
    return value.name if isinstance(value, Check) else f"{len(value)} ranks"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("subject", "check", "nodes"), mostly_slow(CASES, list(filter(_is_quick, CASES))), ids=_name)
def test_strategy_passes_check(tmp_path: Path, subject: Subject, check: Check, nodes: Nodes) -> None:
    assert over_virtual_ranks(subject, check, nodes, tmp_path).broken is None
