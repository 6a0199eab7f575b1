"""The job's torch optimizer, applied to the stretch of the parameters that a rank owns."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpctrain.errors import ModelError
from hpctrain.replica import Group, Layout, Slot, as_array, as_tensor
from hpctrain.state import State

ELEMENTWISE = frozenset(
    "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split()
)
REFUSED = {
    "LBFGS": "it evaluates the loss several times per step, which no strategy here can do; take SGD or Adam",
    "SparseAdam": "arenas hold dense gradients; take Adam",
}


@dataclass(frozen=True)
class OptimizerChoice:
    """A torch.optim class with its keyword arguments. `elementwise`: each element's update depends on no other,
    so that the arena may be cut anywhere."""

    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    elementwise: bool

    @classmethod
    def of(
        cls, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], elementwise: bool | None = None
    ) -> OptimizerChoice:
        """Check the class and its arguments. Raises ModelError."""
        name = optimizer.__name__
        if name in REFUSED:
            raise ModelError(f"optimizer.name = {name!r} cannot be used: {REFUSED[name]}")
        known = list(inspect.signature(optimizer.__init__).parameters)[2:]
        for key in options:
            if key not in known:
                raise ModelError(f"optimizer.{key}: {name} takes no such argument; it takes {', '.join(known)}")
        own = optimizer.__module__.startswith("torch.optim")
        if elementwise is None:
            elementwise = own and name in ELEMENTWISE
        choice = cls(optimizer, options, elementwise)
        choice.build([torch.nn.Parameter(torch.zeros(2, 2))])
        return choice

    def build(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer over parameters or groups; ModelError if it does not take its arguments."""
        try:
            return self.cls(parameters, **self.options)
        except (TypeError, ValueError, RuntimeError) as error:
            given = ", ".join(f"{key} = {value!r}" for key, value in self.options.items())
            raise ModelError(f"optimizer {self.cls.__name__} with {given}: {error}") from error


class Update(ABC):
    """Applies gradients to the arena's stretch [low, high), which `values` is, keeping its optimizer state."""

    def __init__(self, layout: Layout, values: torch.Tensor, low: int, high: int) -> None:
        self.layout, self.values, self.low, self.high = layout, values, low, high
        self._optimizer: torch.optim.Optimizer | None = None
        self._rates: list[float] = []

    def apply(self, gradient: torch.Tensor, factor: float) -> None:
        """One optimizer step; `gradient` has high - low elements, `factor` multiplies the learning rates."""
        if self._optimizer is None:
            return
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._point_at(gradient)
        self._optimizer.step()

    def _adopt(self, choice: OptimizerChoice, groups: list[dict[str, Any]]) -> None:
        if groups:
            self._optimizer = choice.build(groups)
            self._rates = [group["lr"] for group in self._optimizer.param_groups]

    @abstractmethod
    def _point_at(self, gradient: torch.Tensor) -> None: ...

    @abstractmethod
    def state(self) -> State:
        """A copy of the optimizer's state of this stretch."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Take over a state of exactly this stretch."""


class SlicedUpdate(Update):
    """For elementwise optimizers: one flat tensor per parameter group, cut anywhere."""

    def __init__(
        self, choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int
    ) -> None:
        super().__init__(layout, values, low, high)
        self._pieces: list[tuple[int, Group, torch.nn.Parameter, int, int]] = []
        groups = []
        for index, group in enumerate(layout.groups):
            first, last = max(low, group.low), min(high, group.high)
            if first < last:
                flat = torch.nn.Parameter(values[first - low : last - low])
                self._pieces.append((index, group, flat, first, last))
                groups.append({"params": [flat], **group.options})
        self._adopt(choice, groups)

    def _point_at(self, gradient: torch.Tensor) -> None:
        for _, _, flat, first, last in self._pieces:
            flat.grad = gradient[first - self.low : last - self.low]

    def state(self) -> State:
        state = State(self.low, self.high)
        for index, _, flat, first, last in self._pieces:
            assert self._optimizer is not None
            for key, value in self._optimizer.state[flat].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    if key not in state.flat:
                        state.flat[key] = as_array(value.new_zeros(self.high - self.low).cpu())
                    state.flat[key][first - self.low : last - self.low] = as_array(value.cpu())
                else:
                    state.groups.setdefault(str(index), {})[key] = _number(value)
        return state

    def load(self, state: State) -> None:
        for index, _, flat, first, last in self._pieces:
            assert self._optimizer is not None
            here = self._optimizer.state[flat]
            for key, value in state.groups.get(str(index), {}).items():
                here[key] = _revive(value)
            for key, array in state.flat.items():
                part = as_tensor(array[first - state.low : last - state.low].copy())
                here[key] = part.to(flat.device)


class WholeUpdate(Update):
    """For any optimizer: parameters in their own shapes; the stretch is cut only between parameters."""

    def __init__(
        self, choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int
    ) -> None:
        super().__init__(layout, values, low, high)
        self._slots: list[tuple[int, Slot, torch.nn.Parameter]] = []
        groups = []
        for index, group in enumerate(layout.groups):
            inside = layout.slots_in(max(low, group.low), min(high, group.high))
            parameters = [torch.nn.Parameter(_view(values, slot, low)) for slot in inside]
            self._slots += [(index, s, p) for s, p in zip(inside, parameters, strict=True)]
            if parameters:
                groups.append({"params": parameters, **group.options})
        self._adopt(choice, groups)

    def _point_at(self, gradient: torch.Tensor) -> None:
        for _, slot, parameter in self._slots:
            parameter.grad = _view(gradient, slot, self.low)

    def state(self) -> State:
        state = State(self.low, self.high)
        for _, slot, parameter in self._slots:
            assert self._optimizer is not None
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    copy = as_array(value.detach().cpu().contiguous()).copy()
                    state.named.setdefault(slot.name, {})[key] = copy
                else:
                    state.groups.setdefault(slot.name, {})[key] = _number(value)
        return state

    def load(self, state: State) -> None:
        for _, slot, parameter in self._slots:
            assert self._optimizer is not None
            here = self._optimizer.state[parameter]
            for key, value in state.groups.get(slot.name, {}).items():
                here[key] = _revive(value)
            for key, array in state.named.get(slot.name, {}).items():
                here[key] = as_tensor(array.copy()).to(parameter.device)


def make_update(
    choice: OptimizerChoice, layout: Layout, values: torch.Tensor, low: int, high: int
) -> Update:
    """The update that suits the optimizer."""
    cls = SlicedUpdate if choice.elementwise else WholeUpdate
    return cls(choice, layout, values, low, high)


def slice_bounds(layout: Layout, parts: int, elementwise: bool) -> list[int]:
    """Cut the arena into `parts` nearly equal stretches: on cache lines, or between parameters if not elementwise.

    Parts may be empty when there are more parts than cache lines (or parameters).
    """
    cuts: Sequence[int] = layout.cuts
    if elementwise:
        unit = 64 // layout.dtype.itemsize
        return [layout.length // unit * i // parts * unit for i in range(parts)] + [layout.length]
    bounds = [0]
    for part in range(1, parts):
        ideal = layout.length * part // parts
        bounds.append(max(bounds[-1], min(cuts, key=lambda cut: abs(cut - ideal))))
    return [*bounds, layout.length]


def _view(flat: torch.Tensor, slot: Slot, low: int) -> torch.Tensor:
    return flat[slot.offset - low : slot.offset - low + slot.size].view(slot.shape)


def _number(value: Any) -> list[Any]:
    """A plain number with what it was, so that JSON carries it: ["float32", 3.0] or ["number", 3]."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype).removeprefix("torch."), value.item()]
    return ["number", value]


def _revive(value: list[Any]) -> Any:
    kind, number = value
    return number if kind == "number" else torch.tensor(number, dtype=getattr(torch, kind))
