"""Cases that only `.ci/run` runs: more of what other cases have shown."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of `parametrize` that takes long."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(cases: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """All cases; those not in `quick` are marked slow. A case of several values is a tuple."""
    return [case if case in quick else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
