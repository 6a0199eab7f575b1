"""Stretches of the gradient that are sent while backward is still running."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.errors import ModelError
from hpctrain.replica.replica import Replica


class Buckets:
    """Announces stretches of the gradient once they are final, from hooks during backward. The order is fixed (from the
    arena's end, where backward begins), so that all ranks start the same exchanges in the same order.

    A parameter's gradient is considered final after the first call of its hook, unless a hook was called more than once
    in the first backward pass: reentrant checkpointing runs nested backward passes, each of which adds to the gradients
    of the parameters it uses. In that case stretches are announced only after backward. The first pass, which detects
    this, also announces them only after backward.

    `ready(low, high)`: a stretch is final. `poll()`: called in every hook, so that started exchanges go on.
    """

    def __init__(
        self, replica: Replica, nbytes: int, ready: Callable[[int, int], None], poll: Callable[[], None]
    ) -> None:
        self._ready, self._poll = ready, poll
        self._slots = replica.layout.slots
        self._bounds: list[tuple[int, int]] = []
        self._bucket_of: dict[int, int] = {}
        high = replica.layout.length
        members: list[int] = []
        for index in range(len(replica.layout.slots) - 1, -1, -1):
            slot = replica.layout.slots[index]
            members.append(index)
            if (high - slot.offset) * replica.layout.dtype.itemsize >= nbytes or index == 0:
                self._bucket_of |= dict.fromkeys(members, len(self._bounds))
                self._bounds.append((slot.offset, high))
                high, members = slot.offset, []
        self._sizes = [list(self._bucket_of.values()).count(b) for b in range(len(self._bounds))]
        self._armed = False
        self._early = False  # whether stretches are announced during backward
        self._repeats = False  # whether a hook was ever called more than once in one pass
        self._called: set[int] = set()
        self._missing: list[int] = []
        self._next = len(self._bounds)
        self._torn: str | None = None
        self._end = replica.listen(self._note)

    def arm(self) -> None:
        """Prepare for the last backward pass of the round, which comes next."""
        self._armed = True
        self._called.clear()
        self._missing, self._next = list(self._sizes), 0

    def _note(self, index: int) -> None:
        """Backward has added to the gradient of this parameter."""
        if not self._armed:
            return
        bucket = self._bucket_of[index]
        if index in self._called:
            self._repeats, self._early = True, False
            if bucket < self._next:
                self._torn = self._slots[index].name
            return
        self._called.add(index)
        self._missing[bucket] -= 1
        while self._early and self._next < len(self._bounds) and self._missing[self._next] <= 0:
            self._announce()
        self._poll()

    def flush(self) -> None:
        """Announce what no hook has announced: parameters that did not contribute to the loss, or all if backward did
        not run.

        Raises ModelError if a stretch was sent before it was final; this happens only if the model's passes differ.
        """
        if self._torn is not None:
            raise ModelError(
                f"the gradient of parameter {self._torn} was still being added to after it had been sent, which "
                "happens while backward runs (reentrant activation checkpointing in some passes only?); use "
                'checkpoint(..., use_reentrant=False), or strategy.exchange = "shared" or "message" without '
                "strategy.overlap"
            )
        if not self._armed:
            self._next = 0
        while self._next < len(self._bounds):
            self._announce()
        self._early = self._early or (self._armed and not self._repeats)
        self._armed = False

    def _announce(self) -> None:
        low, high = self._bounds[self._next]
        self._next += 1
        self._ready(low, high)

    def remove(self) -> None:
        """Listen no longer."""
        self._end()
