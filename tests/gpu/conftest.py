"""Tests that need a GPU: `python -m pytest tests/gpu`. Without one they are skipped, for one reason."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here runs without a GPU that torch and CuPy can use."""
    here = [item for item in items if HERE in item.path.parents]
    if not here:
        return
    from hpctrain.comm.device.gpu import usable_gpus

    gpus, why = usable_gpus()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if gpus == 0:
            item.add_marker(pytest.mark.skip(reason=why or "torch sees no GPU here"))
