"""Stretches of the gradient that go out while backward still runs."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.errors import ModelError
from hpctrain.replica.replica import Replica


class Buckets:
    """Tells when stretches of the gradient are final, from hooks during backward, in a fixed order (from the
    arena's end, where backward begins), so that all ranks start the same exchanges in the same order.

    A parameter's gradient is taken for final when its hook has been called once, unless it was called more often in
    the first backward pass: reentrant checkpointing runs backward passes within backward passes, and each of them adds
    to what it uses. Then stretches are announced after backward only. So they are in the first pass, which shows it.
    """

    def __init__(self, replica: Replica, nbytes: int, ready: Callable[[int, int], None]) -> None:
        self._ready = ready
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
        self._repeats = False  # whether a hook was ever called twice in one pass
        self._called: set[int] = set()
        self._missing: list[int] = []
        self._next = len(self._bounds)
        self._torn: str | None = None
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._note(index))
            for index, parameter in enumerate(replica.parameters)
        ]

    def arm(self) -> None:
        """The backward pass that follows is the round's last."""
        self._armed = True
        self._called.clear()
        self._missing, self._next = list(self._sizes), 0

    def _note(self, index: int) -> None:
        """This parameter's hook was called."""
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

    def flush(self) -> None:
        """Announce what no hook has: parameters that took no part in the loss (or no backward at all).

        Raises ModelError where a stretch went out before it was final: only a model whose passes differ can do that.
        """
        if self._torn is not None:
            raise ModelError(
                f"strategy.overlap = true: the gradient of parameter {self._torn} was still being added to after it "
                "had been sent (reentrant activation checkpointing in some passes only?); set strategy.overlap = "
                "false, or use checkpoint(..., use_reentrant=False)"
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
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
