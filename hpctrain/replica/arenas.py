"""The arenas of a replica: private, or shared by the ranks of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpctrain.comm.base import Arena, Buffer, Communicator
from hpctrain.replica.layout import Layout

Placement = Literal["node", "copies", "rank"]
"""Where a replica lies. node: in memory that the ranks of a node share, parameters once per node; copies: shared, too,
but with parameters of its own for each rank; rank: private. Gradients are always each rank's own."""


@dataclass(frozen=True)
class Placed:
    """A replica's memory between `place` and `release`. `read`: the part of `values` that this rank's model reads;
    `gradient.mine`: this rank's gradient."""

    values: Arena
    gradient: Arena
    read: Buffer


class NodeArenas:
    """Memory shared by the ranks of a node: the parameters, once per node or (`copies`) once per rank, and a gradient
    for each rank. Construction is collective. `before`: arenas to replace, whose gradients are kept if they fit."""

    def __init__(self, comm: Communicator, layout: Layout, copies: bool, before: NodeArenas | None) -> None:
        self._ranks, self._copies = (comm.members, comm.nodes), copies
        length = layout.length if copies or comm.local_rank == 0 else 0
        self.values = comm.arena(length, layout.dtype, "node")
        self.gradient: Arena
        if before is not None and before.fits(comm, "node"):
            self.gradient = before.gradient
        else:
            self.gradient = comm.arena(layout.length, layout.dtype, "node")

    def fits(self, comm: Communicator, placement: Placement) -> bool:
        """Whether the arenas were made for the ranks of `comm`, and have what the placement needs."""
        return self._ranks == (comm.members, comm.nodes) and (self._copies or placement == "node")

    def placed(self, placement: Placement) -> Placed:
        """These arenas for that placement; the parameters of a node lie in the part of its first rank."""
        return Placed(self.values, self.gradient, self.values.parts[0] if placement == "node" else self.values.mine)

    def clear(self) -> None:
        """Zero this rank's gradient."""
        self.gradient.mine[...] = 0


class OwnPart(Arena):
    """This rank's part of an arena that another object owns."""

    def __init__(self, arena: Arena) -> None:
        self.mine = arena.mine
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None
