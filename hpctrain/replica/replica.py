"""A worker's model with its parameters in one flat arena and its gradients in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from hpctrain.comm.base import Arena, Buffer, Communicator
from hpctrain.errors import ModelError
from hpctrain.models.wrappers import named_parameters
from hpctrain.replica.arenas import NodeArenas, OwnPart, Placed, Placement
from hpctrain.replica.layout import ParameterGroups, Slot, lay_out
from hpctrain.replica.tensors import as_tensor


class Replica:
    """Puts `model`'s trainable parameters into arenas; tied weights are stored once, frozen ones not at all.

    After `place`, `values` and `gradient` are flat tensors of `layout.length` elements (padding stays zero). The
    model's parameters and their `.grad` are views of them; `parameters` lists the parameters in the layout's order.
    Raises ModelError for a model without trainable parameters, with mixed dtypes, or with groups that omit or repeat a
    parameter.
    """

    def __init__(self, model: nn.Module, groups: ParameterGroups | None = None) -> None:
        self.model = model
        named = {name: p for name, p in named_parameters(model) if p.requires_grad}
        if not named:
            raise ModelError(
                f"the model {type(model).__name__} has no trainable parameters; "
                "there is nothing to train (is requires_grad False everywhere?)"
            )
        self.layout, self.parameters = lay_out(named, groups)
        self.device = self.parameters[0].device
        self.values: torch.Tensor = torch.empty(0)
        self.gradient: torch.Tensor = torch.empty(0)
        self._placed: Placed | None = None
        self._shared: NodeArenas | None = None
        self._watched: list[tuple[Slot, nn.Parameter, int, int]] = []
        self._owners = self._find_owners()
        self._frozen = [(name, p) for name, p in named_parameters(model) if not p.requires_grad]
        self._used = bytearray(len(self.parameters))
        self._hooks: list[RemovableHandle] = []
        self._listeners: list[Callable[[int], None]] = []
        self._held: list[int] | None = None

    def _find_owners(self) -> list[tuple[Mapping[str, nn.Parameter | None], str]]:
        """For every slot, the owning module's table of parameters (not a dictionary in scripted modules) and the name
        in it."""
        found = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                found[id(parameter)] = (module._parameters, name)
        return [found[id(parameter)] for parameter in self.parameters]

    # -- arenas --------------------------------------------------------------------------------------------
    @property
    def value_arena(self) -> Arena:
        """The arena of the parameters; this rank's lie in `value_buffer`. RuntimeError before `place`."""
        return self._arenas().values

    @property
    def value_buffer(self) -> Buffer:
        """The parameters that this rank reads: `value_arena.parts[0]` if they exist once per node, else
        `value_arena.mine`. RuntimeError before `place`."""
        return self._arenas().read

    @property
    def gradient_arena(self) -> Arena:
        """The arena of this rank's gradient (`mine`). RuntimeError before `place`."""
        return self._arenas().gradient

    def _arenas(self) -> Placed:
        if self._placed is None:
            raise RuntimeError("the replica has no arenas: call place() first (release() gives them back)")
        return self._placed

    def place(self, comm: Communicator, placement: Placement) -> None:
        """Place the arenas, or move them, keeping the values; those of a node's first rank where they exist once per
        node. Collective over `comm`."""
        old, before = self._owned(), self._placed
        placed = self._place_privately(comm) if placement == "rank" else self._place_shared(comm, placement)
        values = as_tensor(placed.read)
        moved = before is None or placed.read is not before.read
        if moved and (placement != "node" or comm.local_rank == 0):
            self._copy_values(values)
        comm.notify(placed.values)
        comm.wait(placed.values)
        self._placed = placed
        self._point_at(values, as_tensor(placed.gradient.mine))
        self._notice_use()
        comm.barrier()
        kept = self._owned()
        for arena in old:
            if arena not in kept:
                arena.free()

    def _place_shared(self, comm: Communicator, placement: Placement) -> Placed:
        if self._shared is None or not self._shared.fits(comm, placement):  # `place` frees the old ones
            self._shared = NodeArenas(comm, self.layout, placement == "copies", self._shared)
        self._shared.clear()
        return self._shared.placed(placement)

    def _place_privately(self, comm: Communicator) -> Placed:
        """Reuses this rank's part of the shared gradient arena while it exists."""
        values = comm.arena(self.layout.length, self.layout.dtype, "rank")
        if self._shared is None:
            return Placed(values, comm.arena(self.layout.length, self.layout.dtype, "rank"), values.mine)
        self._shared.clear()
        return Placed(values, OwnPart(self._shared.gradient), values.mine)

    def keeps_shared(self, comm: Communicator, placement: Placement) -> bool:
        """Whether this placement over `comm`, which is not "rank", can reuse arenas of an earlier one.

        Shared arenas are kept until `release`: touching new shared memory takes several times as long as copying the
        data into it, and would delay the change of phases.
        """
        return self._shared is not None and self._shared.fits(comm, placement)

    def _owned(self) -> dict[Arena, None]:
        """All existing arenas, in the same order on all ranks."""
        pairs = [self._shared, self._placed]
        return dict.fromkeys(arena for pair in pairs if pair is not None for arena in (pair.values, pair.gradient))

    def release(self) -> None:
        """Move the parameters to the model's own memory and free the arenas. Collective, like `place`."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.values = self.gradient = torch.empty(0)
        self._watched = []
        old = self._owned()
        self._placed = self._shared = None
        for arena in old:
            arena.free()

    def _point_at(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        """Make the model's parameters and their gradients views of these tensors."""
        self.values, self.gradient = values, gradient
        self._watched = []
        for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
            here = slice(slot.offset, slot.offset + slot.size)
            parameter.data = values[here].view(slot.shape)
            parameter.grad = gradient[here].view(slot.shape)
            self._watched.append((slot, parameter, parameter.data_ptr(), parameter.grad.data_ptr()))

    def _notice_use(self) -> None:
        """Record from now on which parameters get a gradient."""
        if not self._hooks:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self.accumulated(index))
                for index, parameter in enumerate(self.parameters)
            ]

    def accumulated(self, index: int) -> None:
        """Backward has added to the gradient of this parameter: torch calls it, or who simulates a backward pass."""
        if self._held is not None:
            self._held.append(index)
            return
        self._used[index] = 1
        for listener in self._listeners:
            listener(index)

    def listen(self, listener: Callable[[int], None]) -> Callable[[], None]:
        """Call `listener` with the index of each parameter that backward has added to the gradient of, from now on.
        Returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def heard(self) -> bool:
        """Whether anybody listens to single gradients."""
        return bool(self._listeners)

    @contextmanager
    def held(self) -> Iterator[list[int]]:
        """Within this context, gradients that become complete are not announced but listed, for who announces them
        later (`accumulated`)."""
        found: list[int] = []
        self._held = found
        try:
            yield found
        finally:
            self._held = None

    def clear(self) -> None:
        """Zero the gradient and reset which parameters had one, at the start of a round."""
        self.gradient.zero_()
        self._used[:] = bytes(len(self._used))

    def used(self) -> NDArray[np.bool_] | None:
        """Which parameters have had a gradient since `clear`, in the layout's order; None: all of them.

        All count as used if backward did not run, because the gradient was then written directly.
        """
        if 0 not in self._used or 1 not in self._used:
            return None
        return np.frombuffer(bytes(self._used), np.bool_)

    def foreign_parameters(self, loss: torch.Tensor) -> list[tuple[int, ...]]:
        """Shapes of the parameters (nn.Parameter) that `loss` depends on but that are not in the arena."""
        own, found = {id(parameter) for parameter in self.parameters}, {}
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                found[id(leaf)] = tuple(leaf.shape)
            waiting += [following for following, _ in node.next_functions]
        return sorted(found.values())

    def first_not_finite(self) -> int:
        """Like `Layout.first_not_finite`, for this rank's whole gradient."""
        return self.layout.first_not_finite(self.gradient)

    def check(self) -> None:
        """Raise ModelError if user code broke the views (`model.to()`, `p.data = ...`, `zero_grad()`), or unfroze
        parameters that were frozen when the run began and so have no place in the arena."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ModelError(
                    f"parameter {name} was frozen (requires_grad = False) when the run began, so it is not trained; "
                    "start with it trainable, freeze it in your loop, and unfreeze it there: parameters without a "
                    "gradient are left alone"
                )
        for (slot, parameter, value, gradient), (owner, name) in zip(self._watched, self._owners, strict=False):
            if parameter.data_ptr() != value or name not in owner or owner[name] is not parameter:
                raise ModelError(
                    f"parameter {slot.name} no longer lies in its arena: something assigned its .data or moved "
                    "the model (model.to(), .half(), load_state_dict(assign=True)); change it in place instead"
                )
            if parameter.grad is None or parameter.grad.data_ptr() != gradient:
                raise ModelError(
                    f"the gradient of {slot.name} no longer lies in its arena: something replaced .grad "
                    "(model.zero_grad() or optimizer.zero_grad()?); hpctrain clears gradients itself"
                )

    def _copy_values(self, into: torch.Tensor) -> None:
        with torch.no_grad():
            for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
                into[slot.offset : slot.offset + slot.size].copy_(parameter.reshape(-1))
