"""The arenas of a replica: private, or shared by the ranks of a node."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.comm.base import Arena, Communicator
from hpctrain.replica.layout import Layout


@dataclass(frozen=True)
class Placed:
    """A replica's memory between `place` and `release`. `values.parts[0]`: the parameters; `gradient.mine`: this rank's
    gradient."""

    values: Arena
    gradient: Arena


class NodeArenas:
    """The parameters once per node, and a gradient buffer for each rank. Construction is collective."""

    def __init__(self, comm: Communicator, layout: Layout) -> None:
        self._ranks = comm.members, comm.nodes
        values = comm.arena(layout.length if comm.local_rank == 0 else 0, layout.dtype, "node")
        self.placed = Placed(values, comm.arena(layout.length, layout.dtype, "node"))

    def fits(self, comm: Communicator) -> bool:
        """Whether the arenas were made for the ranks of `comm`."""
        return self._ranks == (comm.members, comm.nodes)

    def clear(self) -> None:
        """Zero this rank's gradient."""
        self.placed.gradient.mine[...] = 0


class OwnPart(Arena):
    """This rank's part of an arena that another object owns."""

    def __init__(self, arena: Arena) -> None:
        self.mine = arena.mine
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None
