"""A worker's model with its parameters in one flat arena and its gradients in another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from hpctrain.comm.base import BFLOAT16, Arena, Buffer, Communicator
from hpctrain.errors import ModelError
from hpctrain.wrappers import named_parameters

ALIGNMENT = 64  # bytes; every parameter begins on a cache line, as vector units and BLAS like it

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.bfloat16: BFLOAT16,
    torch.float16: np.dtype(np.float16),
}


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the arena, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Group:
    """A stretch [low, high) of the arena whose parameters share optimizer options."""

    low: int
    high: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Which parameter lies where in the arena. The same on all ranks of a run."""

    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    length: int
    dtype: np.dtype[Any]

    @property
    def cuts(self) -> list[int]:
        """Where the arena may be cut without cutting a parameter, both ends included."""
        return [slot.offset for slot in self.slots] + [self.length]

    @property
    def parameters(self) -> int:
        """How many parameters there are, without padding."""
        return sum(slot.size for slot in self.slots)

    def fingerprint(self) -> str:
        """Names, shapes, where parameter groups begin, and dtype, hashed: equal only for the same model."""
        places = [(slot.name, slot.shape) for slot in self.slots], [group.low for group in self.groups]
        text = repr(places) + str(self.dtype)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_not_finite(self, flat: torch.Tensor, low: int = 0) -> int:
        """1 + the index of the first parameter that is not finite in `flat`, the arena's stretch from `low` on; else 0.

        Padding counts to the parameter before it.
        """
        bad = (~torch.isfinite(flat)).nonzero()
        if not len(bad):
            return 0
        return int(np.searchsorted([slot.offset for slot in self.slots], low + int(bad[0]), side="right"))

    def slots_in(self, low: int, high: int) -> list[Slot]:
        """The parameters that lie whole in [low, high)."""
        return [slot for slot in self.slots if low <= slot.offset and slot.offset + slot.size <= high]


ParameterGroups = Sequence[dict[str, Any]]
"""As torch.optim takes them: dictionaries with "params" and options."""


class Replica:
    """Puts `model`'s trainable parameters into arenas; tied weights lie there once, frozen ones not at all.

    After `place`, `values` and `gradient` are flat tensors of `layout.length` elements (padding stays zero),
    whose views the model's parameters and their `.grad` are. Raises ModelError for a model without trainable
    parameters, of mixed dtypes, or with groups that leave out or repeat a parameter.
    """

    def __init__(self, model: nn.Module, groups: ParameterGroups | None = None) -> None:
        self.model = model
        named = {name: p for name, p in named_parameters(model) if p.requires_grad}
        if not named:
            raise ModelError(
                f"the model {type(model).__name__} has no trainable parameters; "
                "nothing could be learnt (is requires_grad False everywhere?)"
            )
        self._parameters: list[nn.Parameter] = []
        self.layout = self._lay_out(named, groups)
        self.device = self._parameters[0].device
        self.values: torch.Tensor = torch.empty(0)
        self.gradient: torch.Tensor = torch.empty(0)
        self.value_arena: Arena | None = None
        self.gradient_arenas: list[Arena] = []
        self._shared: _SharedArenas | None = None
        self._watched: list[tuple[Slot, nn.Parameter, int, int]] = []
        self._owners = self._find_owners()
        self._frozen = [(name, p) for name, p in named_parameters(model) if not p.requires_grad]
        self._used = bytearray(len(self._parameters))
        self._hooks: list[RemovableHandle] = []

    def _lay_out(self, named: dict[str, nn.Parameter], groups: ParameterGroups | None) -> Layout:
        dtypes = {p.dtype for p in named.values()}
        if len(dtypes) > 1 or (dtype := dtypes.pop()) not in NUMPY_DTYPES:
            raise ModelError(
                "trainable parameters must be of one dtype (float32, float64, bfloat16 or float16); "
                f"found {', '.join(sorted({str(p.dtype) for p in named.values()}))}"
            )
        names = {id(p): name for name, p in named.items()}
        unit = ALIGNMENT // NUMPY_DTYPES[dtype].itemsize
        slots: list[Slot] = []
        bounds: list[Group] = []
        offset = 0
        for group in _groups(named, groups):
            low = offset
            for parameter in group["params"]:
                slots.append(Slot(names[id(parameter)], tuple(parameter.shape), offset, parameter.numel()))
                self._parameters.append(parameter)
                offset += -(-parameter.numel() // unit) * unit
            options = {key: value for key, value in group.items() if key != "params"}
            bounds.append(Group(low, offset, options))
        return Layout(tuple(slots), tuple(bounds), offset, NUMPY_DTYPES[dtype])

    def _find_owners(self) -> list[tuple[Mapping[str, nn.Parameter | None], str]]:
        """For every slot a module's own table of parameters (a scripted module's is no dictionary), and the name in
        it."""
        found = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                found[id(parameter)] = (module._parameters, name)
        return [found[id(parameter)] for parameter in self._parameters]

    # -- arenas --------------------------------------------------------------------------------------------
    def place(self, comm: Communicator, shared: bool, gradients: int = 1) -> None:
        """(Re-)place the arenas, keeping the values. Collective over `comm`.

        `shared`: gradients in node-shared arenas and the parameters once per node (those of the node's first
        rank are kept); else both private. `gradients`: how many gradient buffers (`use_gradient` chooses).
        """
        old = self._owned()
        if shared and not self.keeps_shared(comm, gradients):
            self._shared = _SharedArenas(comm, self.layout, gradients)  # the old ones are freed below
        if shared:
            assert self._shared is not None
            value_arena, self.gradient_arenas = self._shared.values, self._shared.cleared()
        else:
            value_arena = comm.arena(self.layout.length, self.layout.dtype, "rank")
            self.gradient_arenas = self._private_gradients(comm, gradients)
        values = as_tensor(value_arena.parts[0])
        if value_arena is not self.value_arena and (not shared or comm.local_rank == 0):
            self._copy_values(values)
        comm.notify(value_arena)
        comm.wait(value_arena)
        self.value_arena, self.values = value_arena, values
        for parameter, slot in zip(self._parameters, self.layout.slots, strict=True):
            parameter.data = values[slot.offset : slot.offset + slot.size].view(slot.shape)
        self.use_gradient(0)
        self._notice_use()
        comm.barrier()
        kept = self._owned()
        for arena in old:
            if arena not in kept:
                arena.free()

    def keeps_shared(self, comm: Communicator, gradients: int = 1) -> bool:
        """Whether such a shared placement finds its arenas there, from an earlier one.

        Shared arenas are kept until `release`: to touch fresh shared memory takes several times as long as to copy
        what goes there, and that would be between two phases.
        """
        return self._shared is not None and self._shared.fits(comm, gradients)

    def _private_gradients(self, comm: Communicator, count: int) -> list[Arena]:
        """This rank's own parts of the shared arenas serve as well, while there are any."""
        length, dtype = self.layout.length, self.layout.dtype
        there = self._shared.cleared()[:count] if self._shared is not None else []
        own: list[Arena] = [_OwnPart(arena) for arena in there]
        return own + [comm.arena(length, dtype, "rank") for _ in range(count - len(own))]

    def _owned(self) -> dict[Arena, None]:
        """All arenas there are, in the order of their making."""
        shared = [self._shared.values, *self._shared.gradients] if self._shared is not None else []
        here = [self.value_arena] if self.value_arena is not None else []
        return dict.fromkeys([*shared, *here, *self.gradient_arenas])

    def release(self) -> None:
        """Move the parameters to memory of the model's own and free the arenas. Collective, like `place`."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.values = self.gradient = torch.empty(0)
        self._watched = []
        old, self._shared = self._owned(), None
        self.value_arena, self.gradient_arenas = None, []
        for arena in old:
            arena.free()

    def use_gradient(self, index: int) -> None:
        """Let backward write into the `index`-th gradient arena."""
        self.gradient = as_tensor(self.gradient_arenas[index].mine)
        self._watched = []
        for parameter, slot in zip(self._parameters, self.layout.slots, strict=True):
            parameter.grad = self.gradient[slot.offset : slot.offset + slot.size].view(slot.shape)
            self._watched.append((slot, parameter, parameter.data_ptr(), parameter.grad.data_ptr()))

    def _notice_use(self) -> None:
        """From now on note which parameters get a gradient."""
        if not self._hooks:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._note(index))
                for index, parameter in enumerate(self._parameters)
            ]

    def _note(self, index: int) -> None:
        self._used[index] = 1

    def clear(self) -> None:
        """Zero the gradient, and forget which parameters had one: a round begins."""
        self.gradient.zero_()
        self._used[:] = bytes(len(self._used))

    def used(self) -> NDArray[np.bool_] | None:
        """Which parameters have had a gradient since `clear`, in the layout's order; None: all of them.

        All count as used where backward was never run, and somebody wrote the gradient.
        """
        if 0 not in self._used or 1 not in self._used:
            return None
        return np.frombuffer(bytes(self._used), np.bool_)

    def foreign_parameters(self, loss: torch.Tensor) -> list[tuple[int, ...]]:
        """Shapes of the parameters (nn.Parameter) that `loss` depends on and the arena does not have."""
        own, found = {id(parameter) for parameter in self._parameters}, {}
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
        """As `Layout.first_not_finite`, of this rank's whole gradient."""
        return self.layout.first_not_finite(self.gradient)

    def check(self) -> None:
        """ModelError if user code broke the views (`model.to()`, `p.data = ...`, `zero_grad()`), or unfroze parameters
        that were frozen when the run began and so have no place in the arena."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ModelError(
                    f"parameter {name} was frozen (requires_grad = False) when the run began, so it is not trained; "
                    "begin with it trainable, freeze it in your loop, and unfreeze it there: parameters without a "
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
            for parameter, slot in zip(self._parameters, self.layout.slots, strict=True):
                into[slot.offset : slot.offset + slot.size].copy_(parameter.reshape(-1))


class _SharedArenas:
    """The parameters once per node, and `gradients` gradient buffers of each rank. Construction is collective."""

    def __init__(self, comm: Communicator, layout: Layout, gradients: int) -> None:
        self._ranks = comm.members, comm.nodes
        self.values = comm.arena(layout.length if comm.local_rank == 0 else 0, layout.dtype, "node")
        self.gradients = [comm.arena(layout.length, layout.dtype, "node") for _ in range(gradients)]

    def fits(self, comm: Communicator, gradients: int) -> bool:
        """Whether they are of these ranks, and so many."""
        return self._ranks == (comm.members, comm.nodes) and len(self.gradients) == gradients

    def cleared(self) -> list[Arena]:
        """The gradient buffers, this rank's parts zero."""
        for arena in self.gradients:
            arena.mine[...] = 0
        return self.gradients


class _OwnPart(Arena):
    """This rank's part of an arena that another owns."""

    def __init__(self, arena: Arena) -> None:
        self.mine = arena.mine
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None


def _groups(named: dict[str, nn.Parameter], groups: ParameterGroups | None) -> list[dict[str, Any]]:
    """The user's groups with their trainable parameters only; checked to cover each exactly once."""
    if groups is None:
        return [{"params": list(named.values())}]
    if isinstance(groups, (str, bytes, dict)) or not isinstance(groups, Iterable):
        raise ModelError(f"optimizer.groups gave a {type(groups).__name__}; expected a list of dictionaries")
    names = {id(p): name for name, p in named.items()}
    chosen = [_trainable(group, index, names) for index, group in enumerate(groups)]
    times = Counter(id(p) for group in chosen for p in group["params"])
    for ident, name in names.items():
        if times[ident] != 1:
            raise ModelError(
                f"optimizer.groups: parameter {name} is listed {times[ident]} times; every trainable parameter must be "
                "in exactly one group (freeze it with requires_grad = False to leave it out)"
            )
    return [group for group in chosen if group["params"]]


def _trainable(group: Any, index: int, names: dict[int, str]) -> dict[str, Any]:
    """A group with a list of its trainable parameters; torch takes one tensor, and (name, tensor) pairs, too."""
    if not isinstance(group, dict) or "params" not in group:
        raise ModelError(f"optimizer.groups: group {index} is no dictionary with params and options")
    params = group["params"]
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    tensors = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in listed]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"optimizer.groups: group {index} lists a {type(tensor).__name__}, not a parameter")
        if tensor.requires_grad and id(tensor) not in names:
            raise ModelError(
                f"optimizer.groups: group {index} lists a tensor of shape {tuple(tensor.shape)} that is no parameter "
                "of the model"
            )
    return {**group, "params": [p for p in tensors if id(p) in names]}


def sum_of_squares(flat: torch.Tensor) -> float:
    """The square of its Euclidean length; rows in the tensor's precision (at least float32), their squares in float64.

    Ten times as fast as float64 throughout, and no copy; its relative error is some 1e-9 for float32.
    """
    row = 1024
    whole = flat.numel() // row * row
    wide = torch.promote_types(flat.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, row), dim=1, dtype=wide).double()
    return float(rows.square().sum() + flat[whole:].double().square().sum())


def as_tensor(array: Buffer) -> torch.Tensor:
    """A torch tensor over the same memory: of a NumPy array, or (by DLPack) of a CuPy one."""
    bits = array.view(np.int16) if array.dtype == BFLOAT16 else array
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.utils.dlpack.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def as_array(tensor: torch.Tensor) -> Buffer:
    """The NumPy array (on a GPU: the CuPy one) over the same memory. For contiguous tensors."""
    bits = tensor.detach()
    if bits.dtype == torch.bfloat16:
        bits = bits.view(torch.int16)
    if bits.device.type == "cpu":
        array = bits.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(bits)
    return array.view(BFLOAT16) if tensor.dtype == torch.bfloat16 else array


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
            for index, parameter in enumerate(replica._parameters)
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
