"""The cores of a host in virtual time: ranks that compute at the same time share them."""

from __future__ import annotations

from hpctrain.comm.virtual.scheduler import Scheduler, Task

DONE = 0.5  # nanoseconds


class Cores:
    """`count` cores, or a part of one. A task uses at most one core. If more tasks compute than there are cores, each
    gets an equal share (as the completely fair scheduler does over many time slices)."""

    def __init__(self, world: Scheduler, count: float) -> None:
        self._world, self._count = world, count
        self._left: dict[Task, float] = {}  # nanoseconds of a whole core
        self._since = 0  # when `_left` was right
        self._first: Task | None = None  # the task that is done first, as far as is known now, and when
        self._end = 0

    @property
    def rate(self) -> float:
        """The share of a core that each computing task has now."""
        return min(1.0, self._count / max(1, len(self._left)))

    def work(self, nanoseconds: float) -> None:
        """Let the current task compute for that long on a whole core, or longer on its share of one."""
        world, left = self._world, self._left
        task = world.current
        assert task is not None
        self._advance()
        left[task] = nanoseconds
        self._plan()
        while True:
            world.block("the end of a computation")
            self._advance()
            if left[task] <= DONE:
                break
            if self._first is task and world.time >= self._end:  # rounding has left a part of it
                self._plan()
        del left[task]
        self._plan()

    def _advance(self) -> None:
        passed, self._since = self._world.time - self._since, self._world.time
        if passed:
            done = passed * self.rate
            for task in self._left:
                self._left[task] -= done

    def _plan(self) -> None:
        """Wake the task that is done first, once it is: it plans for the next one."""
        if not self._left:
            return
        task = min(self._left, key=self._left.__getitem__)
        end = self._world.time + max(1, round(max(0.0, self._left[task]) / self.rate))
        if (task, end) != (self._first, self._end):
            self._first, self._end = task, end
            self._world.wake_at(end, task)
