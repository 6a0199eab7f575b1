"""Ranks failing together: if one rank fails, all raise an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpctrain import errors
from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError
from hpctrain.run import leaving


def agreed(comm: Communicator, what: Callable[[], Any]) -> Any:
    """Call `what` on this rank. If any rank raises an HpctrainError, or `what` calls sys.exit(), all ranks raise the
    error of the lowest such rank. Collective."""
    result: Any = None
    mine: HpctrainError | None = None
    try:
        result = what()
    except HpctrainError as error:
        mine = error
    except SystemExit as error:
        if comm.size == 1:
            raise
        mine = leaving.ended_alone(error)
    found = comm.gather_json([type(mine).__name__, str(mine), mine.status] if mine is not None else None)
    first = next((row for row in found if row is not None), None)
    if first is None:
        return result
    kind: type[HpctrainError] = getattr(errors, first[0], HpctrainError)
    shared = mine if mine is not None and str(mine) == first[1] else kind(first[1])
    shared.everywhere, shared.status = True, first[2]
    raise shared
