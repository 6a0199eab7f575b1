"""All-reduce: every worker applies the same averaged gradient.

On one node, or with equal slices across nodes, gradients lie in node-shared arenas and parameters exist once per
node: rank r sums slice r of everybody's gradients straight out of their memory, updates slice r of the
parameters with its share of the optimizer, and a barrier later all have the new model (`SharedExchange`).
Otherwise the gradient arena is all-reduced by messages and every worker updates its own copy (`MessageExchange`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hpctrain.jobspec import Options
from hpctrain.schedule import Ask
from hpctrain.strategies.base import Needs, Outcome, Phase, Strategy, clip_factor, find_nan

if TYPE_CHECKING:
    from hpctrain.comm.base import Arena, Buffer, Communicator, Request
    from hpctrain.optimizer import Update
    from hpctrain.state import State


class AllReduceOptions(Options):
    """The keys of strategy.name = "all_reduce"."""

    exchange: Literal["auto", "shared", "message"] = Field(
        "auto",
        description="shared: sum out of node-shared memory, with the optimizer sliced over the node's ranks; "
        "message: all-reduce the whole gradient; auto: shared where it can be",
    )
    algorithm: Literal["library", "ring", "halving_doubling", "tree", "hierarchical"] = Field(
        "library", description="how messages are all-reduced (across nodes, or everywhere with exchange = message)"
    )
    overlap: bool = Field(
        False, description="start all-reducing buckets while backward still runs (exchange = message, library only)"
    )
    bucket_mb: float = Field(4.0, gt=0, description="size of the buckets with overlap, in MiB")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap and self.algorithm != "library":
            raise ValueError('has overlap = true, which needs algorithm = "library"')
        if self.overlap and self.exchange == "shared":
            raise ValueError('has overlap = true, which has no effect on exchange = "shared"')
        return self


class AllReduce(Strategy):
    """Synchronous data parallelism: N workers with batch b equal one process with batch N*b."""

    Options = AllReduceOptions
    options: AllReduceOptions

    def __init__(self, options: AllReduceOptions) -> None:
        super().__init__(options)
        self.needs = Needs(parameters="rank" if options.exchange == "message" else "node")
        if options.overlap:
            self.bucket_bytes = int(options.bucket_mb * 2**20)

    def join(self, phase: Phase, state: State | None = None) -> None:
        assert phase.workers is not None
        self.phase = phase
        self.comm = phase.workers
        self._exchange = (SharedExchange if phase.shared else MessageExchange)(phase, self.comm, self.options)
        self._exchange.adopt(state)
        self.version = 0

    def ready(self, low: int, high: int) -> None:
        self._exchange.start(low, high)

    def step(self, samples: int, loss: float) -> Outcome:
        phase = self.phase
        table = self._exchange.headers(np.array([samples, loss if samples else 0.0, float(phase.wish)]))
        total = int(table[:, 0].sum())
        mean = float((table[:, 0] * table[:, 1]).sum() / max(1, total))
        skip = find_nan(phase, phase.roles.workers, table[:, 1].tolist(), phase.step)
        skip = skip or not total  # all have left the loop
        if not skip:
            self._exchange.apply(total / phase.batch, phase.rate(phase.cursor))
            self.version += 1
        self._exchange.finish()
        before, phase.cursor = phase.cursor, phase.round_end
        wish = Ask(int(np.bitwise_or.reduce(table[:, 2].astype(np.int64))))
        ask = phase.conductor.decide(before, phase.cursor, mean, wish)
        result: Any = "skipped" if skip else "applied"
        return Outcome(result, phase.cursor, mean, total, ask, self.version, (0, 0), phase.conductor.why)

    def state(self) -> State | None:
        state = self._exchange.state()
        if state is not None and self.phase.conductor.rule is not None:
            state.rule = self.phase.conductor.rule.state()
        return state

    def leave(self) -> State | None:
        state = self.state()
        self._exchange.free()
        return state


class SharedExchange:
    """Gradients summed slice by slice out of node-shared arenas; nodes all-reduce equal slices with each other."""

    def __init__(self, phase: Phase, comm: Communicator, options: AllReduceOptions) -> None:
        import torch

        from hpctrain.optimizer import slice_bounds
        from hpctrain.replica import as_tensor

        self.phase, self.comm, self.options = phase, comm, options
        self.replica = phase.replica
        sizes = [comm.nodes.count(node) for node in sorted(set(comm.nodes))]
        parts = min(sizes)
        bounds = slice_bounds(self.replica.layout, parts, elementwise=True)
        owns = comm.local_rank < parts
        self.low, self.high = bounds[comm.local_rank : comm.local_rank + 2] if owns else (0, 0)
        self.bounds = bounds
        self.across = comm.split(comm.local_rank if owns else None, comm.rank) if len(sizes) > 1 else None
        self.arena = self.replica.gradient_arenas[0]
        self.slices = [as_tensor(part)[self.low : self.high] for part in self.arena.parts]
        self.sum = torch.zeros_like(self.slices[0])
        self.board: NodeBoard | Messages = NodeBoard(comm) if len(sizes) == 1 else Messages(comm)
        self.update: Update = phase.make_update(self.replica.values[self.low : self.high], self.low, self.high)
        nbytes, elements = self.sum.nbytes, self.sum.numel()
        ranks = len(self.slices)
        self._reducing = comm.span("reduce", nbytes * ranks, flops=float(elements * ranks))
        self._updating = comm.span("update", nbytes, flops=float(elements))
        self._synchronise_parameters(len(sizes) > 1)

    def _synchronise_parameters(self, several: bool) -> None:
        """Everybody takes rank 0's: on its node they are there already."""
        leaders = self.comm.split(0 if self.comm.local_rank == 0 else None) if several else None
        arena = self.replica.value_arena
        assert arena is not None
        if leaders is not None:
            leaders.broadcast(arena.parts[0])
            leaders.free()
        self.comm.notify(arena)
        self.comm.wait(arena)

    def headers(self, row: Buffer) -> Buffer:
        """Nobody's row is there before its gradient is, and on one node the board is memory like these: its barrier is
        the one that summing the gradients needs."""
        if isinstance(self.board, NodeBoard):
            return self.board.exchange(row)
        self.comm.notify(self.arena)
        table = self.board.exchange(row)
        self.comm.wait(self.arena)
        return table

    def start(self, low: int, high: int) -> None:
        """Summing out of memory needs no head start."""

    def apply(self, weight: float, factor: float) -> None:
        from hpctrain.replica import sum_of_squares

        with self._reducing:
            self._sum()
        if self.across is not None:
            from hpctrain.replica import as_array

            self.across.all_reduce(as_array(self.sum), algorithm=self.options.algorithm)
        if weight != 1.0:
            self.sum.mul_(1.0 / weight)
        if self.phase.clip_norm is not None:
            squares = np.array([sum_of_squares(self.sum)])
            table = self.board.exchange(squares)
            mine = [r for r in range(self.comm.size) if self.comm.nodes[r] == self.comm.nodes[0]]
            self.sum.mul_(clip_factor(float(table[mine, 0].sum()), self.phase.clip_norm))
        with self._updating:
            self.update.apply(self.sum, factor, self.phase.momentum(self.phase.cursor))

    def _sum(self) -> None:
        import torch

        if len(self.slices) == 1:
            self.sum.copy_(self.slices[0])
            return
        torch.add(self.slices[0], self.slices[1], out=self.sum)
        for part in self.slices[2:]:
            self.sum.add_(part)

    def finish(self) -> None:
        arena = self.replica.value_arena
        assert arena is not None
        self.comm.notify(arena)
        self.comm.wait(arena)

    def state(self) -> State | None:
        from hpctrain.state import collect_state, send_state

        comm, here = self.comm, self.comm.nodes[self.comm.rank] == self.comm.nodes[0]
        if comm.rank != 0:
            if here and self.low < self.high:
                send_state(comm, self.update.view(), 0)
            return None
        owners = [r for r in comm.local_ranks[1 : len(self.bounds) - 1] if self._part(r)[0] < self._part(r)[1]]
        return collect_state(comm, self.update.view(), owners, self.replica.layout.length)

    def adopt(self, state: State | None) -> None:
        from hpctrain.state import recv_state, start_send_state

        comm = self.comm
        if not comm.broadcast_json(state is not None):
            return
        if state is not None:
            parts = [(rank, self._part(rank)) for rank in range(1, comm.size)]
            sends = [start_send_state(comm, state.cut(*part, []), rank) for rank, part in parts if part[0] < part[1]]
            self.update.load_in_place(state.cut(self.low, self.high, []))
            comm.wait_all([request for started in sends for request in started])
        elif self.low < self.high:
            self.update.load_in_place(recv_state(comm, 0))

    def _part(self, rank: int) -> tuple[int, int]:
        place = sum(self.comm.nodes[r] == self.comm.nodes[rank] for r in range(rank))
        return (self.bounds[place], self.bounds[place + 1]) if place < len(self.bounds) - 1 else (0, 0)

    def free(self) -> None:
        self.slices = []
        self.board.free()
        if self.across is not None:
            self.across.free()


class MessageExchange:
    """The whole gradient all-reduced by messages; every worker keeps the whole optimizer."""

    def __init__(self, phase: Phase, comm: Communicator, options: AllReduceOptions) -> None:
        self.phase, self.comm, self.options = phase, comm, options
        self.replica = phase.replica
        self.update: Update = phase.make_update(self.replica.values, 0, self.replica.layout.length)
        self.board = Messages(comm)
        self._started: list[tuple[int, int, Request]] = []
        assert self.replica.value_arena is not None
        if not phase.equal:
            comm.broadcast(self.replica.value_arena.mine)

    def headers(self, row: Buffer) -> Buffer:
        return self.board.exchange(row)

    def start(self, low: int, high: int) -> None:
        part = self.replica.gradient_arenas[0].mine[low:high]
        self._started.append((low, high, self.comm.start_all_reduce(part)))

    def apply(self, weight: float, factor: float) -> None:
        from hpctrain.replica import sum_of_squares

        gradient = self.replica.gradient
        arena: Arena = self.replica.gradient_arenas[0]
        self._finish_started()
        if not self.options.overlap:
            self.comm.all_reduce(arena.mine, algorithm=self.options.algorithm)
        if weight != 1.0:
            gradient.mul_(1.0 / weight)
        if self.phase.clip_norm is not None:
            gradient.mul_(clip_factor(sum_of_squares(gradient), self.phase.clip_norm))
        with self.comm.span("update", gradient.nbytes, flops=float(gradient.numel())):
            self.update.apply(gradient, factor, self.phase.momentum(self.phase.cursor))

    def _finish_started(self) -> None:
        for _, _, request in self._started:
            request.wait()
        self._started = []

    def finish(self) -> None:
        self._finish_started()

    def state(self) -> State | None:
        return self.update.state() if self.comm.rank == 0 else None

    def adopt(self, state: State | None) -> None:
        from hpctrain.state import recv_state, send_state

        if not self.comm.broadcast_json(state is not None):
            return
        if self.comm.rank == 0:
            for rank in range(1, self.comm.size):
                assert state is not None
                send_state(self.comm, state, rank)
        self.update.load(state if state is not None else recv_state(self.comm, 0))

    def free(self) -> None:
        self.board.free()


class NodeBoard:
    """A few numbers of every rank, seen by all ranks of one node: two rows in turn, so that one barrier is enough."""

    WIDTH = 8

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.arena = comm.arena(2 * self.WIDTH, np.dtype(np.float64), "node")
        self.turn = 0

    def exchange(self, row: Buffer) -> Buffer:
        """Rows of all ranks, in rank order. Collective."""
        self.turn = 1 - self.turn
        here = slice(self.turn * self.WIDTH, self.turn * self.WIDTH + row.size)
        self.arena.mine[here] = row
        self.comm.notify(self.arena)
        self.comm.wait(self.arena)
        return np.array([part[here] for part in self.arena.parts])

    def free(self) -> None:
        self.arena.free()


class Messages:
    """The same over several nodes."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def exchange(self, row: Buffer) -> Buffer:
        return self.comm.gather_rows(row)

    def free(self) -> None:
        return None
