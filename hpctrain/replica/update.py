"""Applies the job's optimizer to the stretch of the parameters that a rank owns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.comm.phantom import deliver
from hpctrain.replica.layout import Layout, Slot, Stretch
from hpctrain.replica.optimizer import OptimizerChoice, momentum_of
from hpctrain.replica.state import OPTIMIZER, Section, State
from hpctrain.replica.tensors import as_array, as_tensor, on_host

_STRETCH = re.compile(r"\d+:\d+:\d+")


class Update(ABC):
    """Applies gradients to the arena's stretch [low, high), held in `values`, and keeps its optimizer state.

    `divisible`: whether `apply` takes a part.
    """

    divisible = False

    def __init__(self, layout: Layout, values: torch.Tensor, low: int, high: int) -> None:
        self.layout, self.values, self.low, self.high = layout, values, low, high
        self._optimizer: torch.optim.Optimizer | None = None
        self._rates: list[float] = []
        self._momenta: list[float] = []
        self._adaptive = False
        self._group_of: dict[int, dict[str, Any]] = {}
        self._velocities: dict[int, dict[torch.nn.Parameter, torch.Tensor]] = {}
        self._taken: set[tuple[Stretch | None, int | None]] = set()  # steps without memory

    def apply(
        self,
        gradient: torch.Tensor,
        factor: float,
        momentum: float = 1.0,
        worker: int | None = None,
        used: NDArray[np.bool_] | None = None,
        part: Stretch | None = None,
    ) -> None:
        """Take one optimizer step. `gradient` has high - low elements. `part`: only with these elements of the arena;
        the step is complete once its parts together are [low, high). `factor` multiplies the learning rates,
        `momentum` the momenta (for Adam and similar, the first beta). `worker`: the worker that computed the gradient,
        if SGD keeps a velocity per worker; see `_step_for`. `used`: which of the layout's parameters have a gradient
        (None: all); the others, and their state, are not changed, as in torch.optim if .grad is None."""
        if self._optimizer is None or self._known(part, worker):
            return
        for group, rate, inertia in zip(self._optimizer.param_groups, self._rates, self._momenta, strict=True):
            group["lr"] = rate * factor
            _set_momentum(group, inertia * momentum)
        self._point_at(gradient, used, part)
        if worker is None:
            self._optimizer.step()
        else:
            self._step_for(worker, self._optimizer)

    def _known(self, part: Stretch | None, worker: int | None) -> bool:
        """Whether this would do nothing: without memory, a step does no more than add to the optimizer's state what it
        then keeps."""
        if not self.values.is_meta:
            return False
        known = (part, worker) in self._taken
        self._taken.add((part, worker))
        return known

    def _step_for(self, worker: int, optimizer: torch.optim.Optimizer) -> None:
        """Step with this worker's own velocity, and Nesterov momentum.

        DANA-Slim (Hakimi, Barkai, Gabel, Schuster 2019, section 4.2): a single velocity over all workers' late
        gradients has too much inertia, together with the implicit momentum due to delays (Mitliagkas et al. 2016). One
        velocity per worker remembers as many of its own steps as in a synchronous run, and Nesterov's step looks as far
        ahead as the others will have moved the parameters meanwhile. Each starts as the velocity that was loaded.
        """
        own, loaded = self._velocities.setdefault(worker, {}), {}
        moved = [row for row in self._with_velocity() if row[1].grad is not None]
        for group, parameter, state in moved:
            group["nesterov"] = True
            loaded[parameter] = state.pop("momentum_buffer", None)
            if parameter in own:
                state["momentum_buffer"] = own[parameter]
            elif loaded[parameter] is not None:
                state["momentum_buffer"] = loaded[parameter].clone()
        optimizer.step()
        for _, parameter, state in moved:
            own[parameter] = state.pop("momentum_buffer")
            if loaded[parameter] is not None:
                state["momentum_buffer"] = loaded[parameter]

    def _with_velocity(self) -> Iterator[tuple[dict[str, Any], torch.nn.Parameter, dict[str, Any]]]:
        """(group, parameter, its state) for SGD only: adaptive optimizers average gradients, or normalise their sum."""
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            if not self._adaptive and "nesterov" in group and group.get("momentum"):
                for parameter in group["params"]:
                    yield group, parameter, self._optimizer.state[parameter]

    @contextmanager
    def common_velocity(self, workers: int) -> Iterator[None]:
        """Within this context, SGD's velocity is the mean over `workers` workers, which is handed over."""
        loaded = {}
        for _, parameter, state in self._with_velocity() if self._velocities else ():
            own = [velocities[parameter] for velocities in self._velocities.values() if parameter in velocities]
            if not own:
                continue
            loaded[parameter] = (state, first := state.get("momentum_buffer"))
            mean = own[0].clone()
            for velocity in own[1:]:
                mean.add_(velocity)
            if first is not None:
                mean.add_(first, alpha=workers - len(own))
            state["momentum_buffer"] = mean.div_(workers)
        yield
        for state, first in loaded.values():
            del state["momentum_buffer"]
            if first is not None:
                state["momentum_buffer"] = first

    def _adopt(self, choice: OptimizerChoice, groups: list[dict[str, Any]]) -> None:
        if groups:
            self._optimizer = choice.build(groups)
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            self._adaptive = choice.adaptive
            self._momenta = [momentum_of(group) for group in self._optimizer.param_groups]
            self._group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def _revive(self, value: list[Any], parameter: torch.Tensor) -> Any:
        """The inverse of `_number`; a tensor is placed where torch's own optimizers keep theirs."""
        kind, number = value
        if kind == "number":
            return number
        group = self._group_of[id(parameter)]
        beside = group.get("capturable") or group.get("fused") or isinstance(self._optimizer, torch.optim.ASGD)
        device = parameter.device if beside else torch.device("cpu")
        return torch.tensor(number, dtype=getattr(torch, kind), device=device)

    @abstractmethod
    def _point_at(self, gradient: torch.Tensor, used: NDArray[np.bool_] | None, part: Stretch | None) -> None: ...

    def state(self) -> State:
        """A copy of the optimizer's state of this stretch."""
        return self.view().copy()

    def load(self, state: State) -> None:
        """Load a copy of a state of exactly this stretch."""
        self.load_in_place(state.copy())

    @abstractmethod
    def view(self) -> State:
        """The optimizer's state of this stretch, not copied: read-only, and valid until the next `apply`."""

    @abstractmethod
    def load_in_place(self, state: State) -> None:
        """`load` without copies: the optimizer takes over the state's arrays (on the CPU)."""


class Piece(NamedTuple):
    """The stretch [first, last) of the arena, within one parameter group, as a parameter that torch updates."""

    group: int
    flat: torch.nn.Parameter
    first: int
    last: int


class SlicedUpdate(Update):
    """For elementwise optimizers: one flat tensor per parameter group, cut anywhere; and cut further where parts of a
    step begin and end.

    If some parameters lack a gradient at times, the tensors are divided between these and the others, so that all
    elements of a piece have the same history. torch's optimizers then count steps as they would for the individual
    parameters.
    """

    def __init__(self, choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int) -> None:
        super().__init__(layout, values, low, high)
        self.divisible = choice.divisible
        self._pieces: list[Piece] = []
        self._offsets = np.array([slot.offset for slot in layout.slots], np.int64)
        self._divided = False  # whether numbers are stored per stretch: on all ranks, or on none
        self._used: NDArray[np.bool_] | None = None
        groups = []
        for index, group in enumerate(layout.groups):
            first, last = max(low, group.low), min(high, group.high)
            if first < last:
                self._pieces.append(Piece(index, self._flat(first, last), first, last))
                groups.append({"params": [self._pieces[-1].flat], **group.options})
        self._adopt(choice, groups)

    def _flat(self, first: int, last: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.values[first - self.low : last - self.low])

    def _point_at(self, gradient: torch.Tensor, used: NDArray[np.bool_] | None, part: Stretch | None) -> None:
        if used is not None and not (self._used is not None and np.array_equal(used, self._used)):
            self._divide(self._offsets[1:][used[1:] != used[:-1]].tolist())
            self._used, self._divided = used, True
        low, high = part or (self.low, self.high)
        if part is not None:
            self._divide([low, high])
        for piece in self._pieces:
            has = low <= piece.first < high and (used is None or used[self._slot_at(piece.first)])
            piece.flat.grad = gradient[piece.first - self.low : piece.last - self.low] if has else None

    def _slot_at(self, offset: int) -> int:
        return int(np.searchsorted(self._offsets, offset, side="right")) - 1

    def _divide(self, cuts: list[int]) -> None:
        """Cut the pieces at these positions, along with their state and velocities."""
        pieces = []
        for piece in self._pieces:
            inside = [cut for cut in cuts if piece.first < cut < piece.last]
            pieces += self._cut(piece, [piece.first, *inside, piece.last]) if inside else [piece]
        self._pieces = pieces

    def _cut(self, piece: Piece, bounds: list[int]) -> list[Piece]:
        assert self._optimizer is not None
        parts = [Piece(piece.group, self._flat(a, b), a, b) for a, b in pairwise(bounds)]
        group = self._group_of.pop(id(piece.flat))
        place = next(n for n, parameter in enumerate(group["params"]) if parameter is piece.flat)
        group["params"][place : place + 1] = [part.flat for part in parts]
        self._group_of |= {id(part.flat): group for part in parts}
        state = self._optimizer.state.pop(piece.flat, None)
        moved = [(velocities, velocities.pop(piece.flat, None)) for velocities in self._velocities.values()]
        for part in parts:
            here = slice(part.first - piece.first, part.last - piece.first)
            if state:
                self._optimizer.state[part.flat] = {key: _part(value, here) for key, value in state.items()}
            for velocities, velocity in moved:
                if velocity is not None:
                    velocities[part.flat] = velocity[here]
        return parts

    def view(self) -> State:
        state = State(self.low, self.high)
        kept = state.optimizer
        for piece in self._pieces:
            assert self._optimizer is not None
            numbers = {}
            for key, value in self._optimizer.state[piece.flat].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    array = as_array(on_host(value))
                    if piece.last - piece.first == self.high - self.low:
                        kept.flat[key] = array
                    else:
                        room = state.room(OPTIMIZER, key, array.dtype)
                        deliver(array, room[piece.first - self.low : piece.last - self.low])
                else:
                    numbers[key] = _number(value)
            if self._divided:
                fresh = not self._optimizer.state[piece.flat]
                kept.numbers[f"{piece.group}:{piece.first}:{piece.last}"] = {FRESH: True} if fresh else numbers
            elif numbers:
                kept.numbers[str(piece.group)] = numbers
        return state

    def load_in_place(self, state: State) -> None:
        kept = state.optimizer
        stretches = _stretches(kept)
        if stretches:
            self._divided = True
            self._divide(sorted({bound for _, low, high, _ in stretches for bound in (low, high)}))
        for piece in self._pieces:
            assert self._optimizer is not None
            numbers = kept.numbers.get(str(piece.group), {})
            for index, low, high, own in stretches:
                numbers = own if index == piece.group and low <= piece.first < high else numbers
            if FRESH in numbers:
                continue
            here = self._optimizer.state[piece.flat]
            for key, value in numbers.items():
                here[key] = self._revive(value, piece.flat)
            for key, array in kept.flat.items():
                here[key] = as_tensor(array[piece.first - state.low : piece.last - state.low]).to(piece.flat.device)


FRESH = "no update yet"  # replaces the numbers of a stretch without optimizer state


def _part(value: Any, here: slice) -> Any:
    """The part of a piece's state: a slice of a moment, or a copy of a number."""
    if not isinstance(value, torch.Tensor):
        return value
    return value[here] if value.dim() else value.clone()


def _stretches(kept: Section) -> list[tuple[int, int, int, dict[str, Any]]]:
    """(group, first, last, numbers) of the stretches that a divided `SlicedUpdate` stored. Equal neighbours are merged,
    because they may have been cut for other ranks."""
    keys = [key for key in kept.numbers if _STRETCH.fullmatch(key)]
    found: list[tuple[int, int, int, dict[str, Any]]] = []
    for key in sorted(keys, key=lambda key: [int(part) for part in key.split(":")]):
        (index, low, high), numbers = (int(part) for part in key.split(":")), kept.numbers[key]
        if found and found[-1][0] == index and found[-1][2] == low and found[-1][3] == numbers:
            low = found.pop()[1]
        found.append((index, low, high, numbers))
    return found


class WholeUpdate(Update):
    """For any optimizer: parameters in their own shapes; the stretch is cut only between parameters."""

    def __init__(self, choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int) -> None:
        super().__init__(layout, values, low, high)
        self._slots: list[tuple[int, Slot, torch.nn.Parameter]] = []
        groups = []
        for index, group in enumerate(layout.groups):
            inside = layout.slots_in(max(low, group.low), min(high, group.high))
            parameters = [torch.nn.Parameter(_view(values, slot, low)) for slot in inside]
            self._slots += [(index, s, p) for s, p in zip(inside, parameters, strict=True)]
            if parameters:
                groups.append({"params": parameters, **group.options})
        places = {slot.name: place for place, slot in enumerate(layout.slots)}
        self._places = [places[slot.name] for _, slot, _ in self._slots]
        self._adopt(choice, groups)

    def _point_at(self, gradient: torch.Tensor, used: NDArray[np.bool_] | None, part: Stretch | None) -> None:
        assert part is None
        for (_, slot, parameter), place in zip(self._slots, self._places, strict=True):
            parameter.grad = _view(gradient, slot, self.low) if used is None or used[place] else None

    def view(self) -> State:
        state = State(self.low, self.high)
        kept = state.optimizer
        for _, slot, parameter in self._slots:
            assert self._optimizer is not None
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    kept.named.setdefault(slot.name, {})[key] = as_array(on_host(value.detach()).contiguous())
                else:
                    kept.numbers.setdefault(slot.name, {})[key] = _number(value)
        return state

    def load_in_place(self, state: State) -> None:
        kept = state.optimizer
        for _, slot, parameter in self._slots:
            assert self._optimizer is not None
            here = self._optimizer.state[parameter]
            for key, value in kept.numbers.get(slot.name, {}).items():
                here[key] = self._revive(value, parameter)
            for key, array in kept.named.get(slot.name, {}).items():
                here[key] = as_tensor(array).to(parameter.device)


def make_update(choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int) -> Update:
    """Create the update that suits the optimizer."""
    cls = SlicedUpdate if choice.elementwise else WholeUpdate
    return cls(choice, layout, values, low, high)


def _view(flat: torch.Tensor, slot: Slot, low: int) -> torch.Tensor:
    return flat[slot.offset - low : slot.offset - low + slot.size].view(slot.shape)


def _number(value: Any) -> list[Any]:
    """A plain number with its type, so that JSON can store it: ["float32", 3.0] or ["number", 3]."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype).removeprefix("torch."), value.item()]
    return ["number", value]


def _set_momentum(group: dict[str, Any], value: float) -> None:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif "momentum" in group:
        group["momentum"] = value
