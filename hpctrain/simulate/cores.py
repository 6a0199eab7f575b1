"""The cores of a host in virtual time: ranks that compute at the same time share them."""

from __future__ import annotations

from math import ceil

from hpctrain.comm.virtual.scheduler import Scheduler, Task

DONE = 0.5  # nanoseconds
PERIOD = 10_000_000  # nanoseconds, over which a part of a core is counted; the laboratory's, too


class Cores:
    """`count` cores. A task uses at most one. If more tasks compute than there are cores, each gets an equal share (as
    the completely fair scheduler does over many time slices).

    Of a part of a core, such as the last half of 1.5, ranks get what a quota of the control groups gives: they compute
    at full speed until the host has used up `count` times 10 ms in a period of 10 ms, and then wait for the next one.
    """

    def __init__(self, world: Scheduler, count: float) -> None:
        self._world = world
        self._whole, self._quota = ceil(count), count * PERIOD  # nanoseconds of cores in a period
        self._left: dict[Task, float] = {}  # nanoseconds of a whole core
        self._since = 0  # when `_left` and `_used` were right
        self._used = 0.0  # of the quota, in the period of `_since`
        self._first: Task | None = None  # the task that is done first, as far as is known now, and when
        self._end = 0

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

    @property
    def _rate(self) -> float:
        """The share of a core that each computing task has while there is quota left."""
        return min(1.0, self._whole / max(1, len(self._left)))

    def _running(self, start: int, used: float) -> float:
        """For how many nanoseconds from `start` on tasks can run in that period, of whose quota so much is used."""
        rest = PERIOD - start % PERIOD
        busy = self._rate * len(self._left)
        return min(rest, (self._quota - used) / busy) if busy else rest

    def _advance(self) -> None:
        now, busy, rate = self._world.time, self._rate * len(self._left), self._rate
        while self._since < now:
            end = min(now, self._since - self._since % PERIOD + PERIOD)
            ran = min(end - self._since, self._running(self._since, self._used))
            for task in self._left:
                self._left[task] -= ran * rate
            self._used = 0.0 if end % PERIOD == 0 else self._used + ran * busy
            self._since = end
            if not self._left and now - end > PERIOD:  # nothing happens in whole periods
                self._since, self._used = now - now % PERIOD, 0.0

    def _plan(self) -> None:
        """Wake the task that is done first, once it is: it plans for the next one."""
        if not self._left:
            return
        task = min(self._left, key=self._left.__getitem__)
        end = self._ending(max(0.0, self._left[task]) / self._rate)
        if (task, end) != (self._first, self._end):
            self._first, self._end = task, end
            self._world.wake_at(end, task)

    def _ending(self, running: float) -> int:
        """When tasks have run for that many nanoseconds from now on."""
        now = self._world.time
        first = self._running(now, self._used)
        if running <= first:
            return now + max(1, round(running))
        running -= first
        each = self._running(0, 0.0)
        periods = ceil(running / each) - 1
        return now - now % PERIOD + PERIOD + periods * PERIOD + max(1, round(running - periods * each))
