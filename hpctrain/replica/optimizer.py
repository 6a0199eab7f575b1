"""The job's torch optimizer: its class and arguments, validated."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hpctrain.errors import ModelError
from hpctrain.replica.layout import Layout
from hpctrain.text import did_you_mean

ELEMENTWISE = frozenset(
    ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SignSGD"]
)
FUSED = frozenset(["Adam", "AdamW", "SGD"])  # torch can update these in one kernel on CUDA
IMPLEMENTATIONS = frozenset(["capturable", "differentiable", "foreach", "fused"])  # arguments that choose another
REFUSED = {
    "LBFGS": "it evaluates the loss several times per step, which no strategy here can do; use SGD or Adam",
    "SparseAdam": "arenas hold dense gradients; use Adam",
}


@dataclass(frozen=True)
class OptimizerChoice:
    """A torch.optim class with its keyword arguments. `elementwise`: each element is updated independently of the
    others, so the arena may be cut anywhere. `adaptive`: updates do not grow with the gradient (Adam and similar)."""

    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    elementwise: bool
    adaptive: bool = False

    @classmethod
    def of(
        cls,
        optimizer: type[torch.optim.Optimizer],
        options: dict[str, Any],
        elementwise: bool | None = None,
        device: torch.device | str = "cpu",
    ) -> OptimizerChoice:
        """Check the class and its arguments for parameters on `device`. Raises ModelError.

        On a GPU, one kernel updates all elements (fused=True), unless the arguments choose another implementation.
        """
        name, own = optimizer.__name__, _is_known(optimizer)
        for base in optimizer.__mro__:
            if _is_known(base) and base.__name__ in REFUSED:
                raise ModelError(f"optimizer.name = {name!r} cannot be used: {REFUSED[base.__name__]}")
        _check_keys(optimizer, options, "optimizer.")
        if own and elementwise and name not in ELEMENTWISE:
            raise ModelError(f"optimizer.elementwise = true: {name} needs whole parameters; leave the key out")
        if elementwise is None:
            elementwise = own and name in ELEMENTWISE
        if own and name in FUSED and torch.device(device).type == "cuda" and not IMPLEMENTATIONS & options.keys():
            options = {**options, "fused": True}
        choice = cls(optimizer, options, elementwise)
        choice._try(device)
        return replace(choice, adaptive=choice._normalises(device))

    @property
    def divisible(self) -> bool:
        """Whether a step may be taken in parts. Not if the class is the user's: it may count its steps."""
        return self.elementwise and _is_known(self.cls)

    def check(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        """Check that the optimizer accepts every parameter, with the options of its group. Raises ModelError."""
        for index, group in enumerate(layout.groups):
            _check_keys(self.cls, group.options, f"optimizer.groups: group {index} has ")
            merged = OptimizerChoice(self.cls, {**self.options, **group.options}, self.elementwise)
            merged._try(device)
            for slot in layout.slots_in(group.low, group.high) if not self.elementwise else []:
                try:
                    merged.cls([torch.nn.Parameter(torch.zeros(()).expand(slot.shape))], **merged.options)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise ModelError(
                        f"optimizer.name = {self.cls.__name__!r}: parameter {slot.name}: {error}; choose another "
                        "optimizer, or freeze the parameters that it does not accept"
                    ) from None

    def check_movable(self) -> None:
        """Raise ModelError if the optimizer keeps state for all parameters together outside torch's `state`: it cannot
        be redistributed between ranks. Needed for jobs with several phases."""
        optimizer, _ = self._step("cpu")
        fresh = self.build([torch.nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
        for key, value in optimizer.param_groups[0].items():
            if key not in ("params", "lr") and value is not fresh.get(key) and value != fresh.get(key):
                raise ModelError(
                    f"optimizer {self.cls.__name__} counts {key} for all parameters together, and that cannot be "
                    "redistributed when a phase ends; train in one phase, or use another optimizer"
                )

    def momentum(self, layout: Layout) -> float:
        """The highest momentum of any group of parameters; 0 if it has none."""
        groups = [{**self.options, **group.options} for group in layout.groups]
        made = [OptimizerChoice(self.cls, options, self.elementwise)._step("cpu")[0] for options in groups]
        return max((momentum_of(optimizer.param_groups[0]) for optimizer in made), default=0.0)

    def moments(self, layout: Layout, device: torch.device | str = "cpu") -> list[list[str]]:
        """The names of the state kept per parameter of each group ("exp_avg", "step" ...), sorted."""
        choices = [OptimizerChoice(self.cls, {**self.options, **g.options}, self.elementwise) for g in layout.groups]
        steps = [choice._step(device) for choice in choices]
        return [sorted(k for k, v in optimizer.state[p].items() if v is not None) for optimizer, p in steps]

    def _try(self, device: torch.device | str = "cpu") -> None:
        """Take one step on zeros, to detect options that fail only there."""
        optimizer, parameter = self._step(device)
        if "lr" not in optimizer.param_groups[0]:
            raise ModelError(
                f"optimizer {self.cls.__name__} has no lr in its param_groups, so its learning rate cannot be scheduled"
            )
        for key, value in optimizer.state[parameter].items():
            self._check_state(key, value, parameter)

    def _normalises(self, device: torch.device | str) -> bool:
        """Whether a gradient ten times as long gives an update that is hardly longer."""
        plain = replace(self, options={key: value for key, value in self.options.items() if key != "weight_decay"})
        short, long = (plain._step(device, size)[1].detach().abs().sum() for size in (1.0, 10.0))
        return bool(long < 3.0 * short)

    def _step(self, device: torch.device | str, size: float = 0.0) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
        """Take one step on parameters of 0 with gradients of `size`."""
        parameter = torch.nn.Parameter(torch.zeros(4 if self.elementwise else (2, 2), device=device))
        optimizer = self.build([parameter])
        parameter.grad = torch.full_like(parameter, size)
        try:
            optimizer.step()
        except Exception as error:
            raise ModelError(f"{self.words}: {_line(error)}") from error
        return optimizer, parameter

    def _check_state(self, key: str, value: Any, parameter: torch.Tensor) -> None:
        """Check that this state can be cut, sent and reassembled by other ranks."""
        name = self.cls.__name__
        if isinstance(value, torch.Tensor) and self.elementwise and value.dim() and value.shape != parameter.shape:
            raise ModelError(
                f"optimizer {name} keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}, so it is not elementwise; leave optimizer.elementwise out"
            )
        if not isinstance(value, (torch.Tensor, int, float, type(None))):
            raise ModelError(
                f"optimizer {name} keeps {key}, a {type(value).__name__}, for each parameter, which cannot be moved "
                "between ranks or saved; its state must be tensors and numbers"
            )

    @property
    def words(self) -> str:
        """The class with its arguments, for messages."""
        given = ", ".join(f"{key} = {value!r}" for key, value in self.options.items())
        return f"optimizer {self.cls.__name__} with {given}"

    def build(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer over parameters or groups; ModelError if it rejects its arguments."""
        cls = without_dynamo(self.cls) if _is_known(self.cls) else self.cls
        try:
            return cls(parameters, **self.options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self.words}: {_line(error)}") from error


def without_dynamo(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class that does the same as this one, torch's or ours, but does not import torch._dynamo, torch's compiler.

    That takes 3 s of processor time per rank, more than torch itself, and has an effect only where an optimizer is
    compiled. torch wraps `step` and `add_param_group` in functions that import it.
    """
    raw = inspect.unwrap(cls.step)

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return raw(self, closure)

    own = {"step": step, "add_param_group": inspect.unwrap(cls.add_param_group), "__module__": cls.__module__}
    return type(cls.__name__, (cls,), own)


def momentum_of(group: dict[str, Any]) -> float:
    """The momentum of a torch optimizer's parameter group; 0 if it has none."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def _is_known(cls: type) -> bool:
    """Whether it is torch's or hpctrain's."""
    return cls.__module__.startswith(("torch.optim", "hpctrain."))


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _check_keys(optimizer: type[torch.optim.Optimizer], options: Iterable[str], where: str) -> None:
    parameters = list(inspect.signature(optimizer.__init__).parameters.values())[2:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for key in options:
        if key not in known:
            raise ModelError(
                f"{where}{key}: {optimizer.__name__} has no such argument{did_you_mean(key, known)}; "
                f"it takes {', '.join(known)}"
            )


def decay(model: torch.nn.Module) -> list[dict[str, Any]]:
    """optimizer.groups = "decay": weight decay only on parameters with two or more dimensions (matrices and kernels),
    not on biases and the scales of norms."""
    parameters = list(model.parameters())
    flat = [p for p in parameters if p.dim() < 2]
    return [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": flat, "weight_decay": 0.0}]
