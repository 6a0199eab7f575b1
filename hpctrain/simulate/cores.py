"""The cores of hosts in virtual time: ranks that compute at the same time share them."""

from __future__ import annotations

import random
from math import ceil, inf

from hpctrain.comm.virtual.scheduler import Scheduler, Task, Timer

DONE = 0.5  # nanoseconds
PERIOD = 10_000_000  # nanoseconds, over which a part of a core is counted; the laboratory's, too
TICK = 4_000_000  # nanoseconds: how often Linux looks who should run, and whether a quota is used up (CONFIG_HZ = 250)
LATE = 2_000_000  # nanoseconds of a quota that are used too much before Linux notices, about
KEPT = 1_000_000  # nanoseconds of an unused quota that stay for the next period (min_cfs_rq_runtime)
SLICE = 5_000_000  # the same if a task runs when that begins (sched_cfs_bandwidth_slice)


class Cores:
    """What the ranks of one host compute with: `count` cores, or None: one for each task. A task uses at most one. If
    more tasks compute than there are cores, they take turns of 4 ms.

    Of a part of a core, such as the last half of 1.5, ranks get what a quota of Linux's control groups gives: they
    compute at full speed until the host has used up `count` times 10 ms in a period of 10 ms, then wait for the next
    one. Linux looks only every 4 ms, and subtracts from the next period what was used too much.
    """

    def __init__(self, machine: Machine, count: float | None, phase: int) -> None:
        self._machine = machine
        self.width = inf if count is None else ceil(count)
        self.quota = inf if count is None or count == self.width else count * PERIOD
        self.budget = self.quota  # nanoseconds of cores, until `refresh`; negative: used too much
        self.refresh = phase  # when the next period begins
        self.stopped = False

    def work(self, nanoseconds: float) -> None:
        """Let the current task compute for that long on a core, when it gets one."""
        self._machine.work(self, nanoseconds)

    def used(self, nanoseconds: float, since: int) -> None:
        """That much of the host's quota has already been used, in the time since then."""
        if self.quota < inf:
            now = self._machine.advance()
            here = min(now - since, now - (self.refresh - PERIOD))
            self.budget = max(self.budget - nanoseconds * here / max(1, now - since), -LATE)
            self.stopped = self.stopped or self.budget <= -LATE

    def spend(self, nanoseconds: float, now: int) -> None:
        """Tasks of the host have computed for that long until now, where a turn, a task or a period ends."""
        if self.quota < inf:
            self.budget -= nanoseconds
            self.stopped = self.stopped or self.budget <= DONE - LATE
            while self.refresh <= now:
                self.budget = min(self.budget, KEPT if nanoseconds <= 0 else SLICE) + self.quota
                self.refresh += PERIOD
                if self.budget >= self.quota and self.refresh < now:  # nothing happens in whole periods
                    self.refresh += (now - self.refresh) // PERIOD * PERIOD
                self.stopped = self.budget <= 0


class Machine:
    """`count` cores (None: enough for all) that one or several hosts are parts of. `turns`: how many times longer work
    takes while tasks take turns on cores, whose caches they empty for each other."""

    def __init__(self, world: Scheduler, count: float | None, seed: int | str = 0, turns: float = 1.0) -> None:
        self._world, self._count, self._turns = world, inf if count is None else count, turns
        self._hosts: list[Cores] = []
        self._phases = random.Random(f"{seed}/periods")
        self._left: dict[Task, float] = {}  # nanoseconds; tasks in the order in which they get cores
        self._host: dict[Task, Cores] = {}
        self._since = 0
        self._timer: Timer | None = None

    def host(self, count: float | None) -> Cores:
        """A part of it, with that many cores. Its periods begin at a random time."""
        host = Cores(self, count, self._phases.randrange(PERIOD))
        self._hosts.append(host)
        return host

    def work(self, host: Cores, nanoseconds: float) -> None:
        """See `Cores.work`."""
        task = self._world.current
        assert task is not None
        self.advance()
        self._left[task], self._host[task] = nanoseconds, host
        self._plan()
        while task in self._left:
            self._world.block("the end of a computation")

    def _running(self) -> list[Task]:
        """The tasks that have a core."""
        found, taken = list[Task](), dict[Cores, int]()
        for task, host in self._host.items():
            if not host.stopped and taken.get(host, 0) < host.width:
                taken[host] = taken.get(host, 0) + 1
                found.append(task)
                if len(found) >= self._count:
                    break
        return found

    def advance(self) -> int:
        """Let what computes go on until now; returns the time."""
        now = self._world.time
        while self._since < now:
            running = self._running()
            end, pace = int(min(now, self._change(running))), self._pace(running)
            spent = dict.fromkeys(self._hosts, 0)
            for task in running:
                self._left[task] -= (end - self._since) * pace
                spent[self._host[task]] += end - self._since
            for host, nanoseconds in spent.items():
                host.spend(nanoseconds, end)
            for task in running:
                if self._left[task] <= DONE:
                    del self._left[task], self._host[task]
                    self._world.wake(task)
                elif end % TICK == 0 and len(running) < len(self._host):  # its turn is over
                    self._host[task] = self._host.pop(task)
            self._since = end
        return now

    def _pace(self, running: list[Task]) -> float:
        """How much work a running task does in a time."""
        wanted = sum(not host.stopped for host in self._host.values())
        return 1.0 if len(running) == wanted else 1.0 / self._turns

    def _change(self, running: list[Task]) -> float:
        """When another task may get a core: one is done, its turn is over, or a period begins."""
        since, hosts = self._since, dict.fromkeys(self._host.values())
        pace = self._pace(running)
        times = [since + max(1, ceil(self._left[task] / pace)) for task in running]
        limited = [host for host in hosts if host.quota < inf]
        times += [host.refresh for host in limited]
        for host in limited:
            if busy := sum(self._host[task] is host for task in running):
                times.append(since + max(1, ceil((host.budget + LATE) / busy)))
        if len(running) < len(self._host):
            times.append((since // TICK + 1) * TICK)
        return min(times, default=inf)

    def _plan(self) -> None:
        """Come back when that changes."""
        if self._timer is not None:
            self._timer.finished = True
            self._timer = None
        time = self._change(self._running())
        if time < inf:
            self._timer = self._world.call_at(int(time), self._come_back)

    def _come_back(self, _: object) -> None:
        self._timer = None
        self.advance()
        self._plan()
