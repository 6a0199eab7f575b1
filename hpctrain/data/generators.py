"""Python's, NumPy's and torch's global generators: a process has one of each, and all of its threads share them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain.data.order import words


def seed_all(seed: int) -> None:
    """Seed the three generators (torch's: the CPU one) from any integer, such that no two produce the same numbers."""
    torch.default_generator.manual_seed(seed)
    seed_others(seed)


def seed_run(seed: int, device: torch.device) -> None:
    """Seed the three generators and the device's. Does not rely on torch.manual_seed alone: for each kind of device not
    in use, it also records, with the stack, that it must be seeded later; that takes milliseconds, and the records are
    never removed."""
    if device.type != "cpu":
        torch.manual_seed(seed)
    seed_all(seed)


def seed_others(seed: int) -> None:
    """Seed only Python's and NumPy's generators."""
    random.seed(seed)
    np.random.seed([*words(seed), 1])  # without the 1, NumPy's numbers would equal Python's


@dataclass(frozen=True)
class Generators:
    """The states of the three generators at one moment; `seed`: what torch's was last seeded with."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    seed: int

    @classmethod
    def now(cls) -> Generators:
        """The current states. Takes about 0.1 ms, most of it for NumPy's."""
        numpy: dict[str, Any] = np.random.get_state(legacy=False)
        generator = torch.default_generator
        return cls(random.getstate(), numpy, generator.get_state(), generator.initial_seed())

    def restore(self) -> None:
        """Restore all three states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)

    def differing(self, other: Generators) -> set[str]:
        """Which of "Python", "NumPy", "torch" and "seed" differ."""
        equal = {
            "Python": self.python == other.python,
            "NumPy": _comparable(self.numpy) == _comparable(other.numpy),
            "torch": torch.equal(self.torch, other.torch),
            "seed": self.seed == other.seed,
        }
        return {name for name, same in equal.items() if not same}

    def replace(self, other: Generators, names: set[str]) -> Generators:
        """These states, except for those of `names`, which come from `other`."""
        return Generators(
            other.python if "Python" in names else self.python,
            other.numpy if "NumPy" in names else self.numpy,
            other.torch if "torch" in names else self.torch,
            other.seed if "torch" in names else self.seed,
        )

    def texts(self) -> dict[str, NDArray[np.uint8]]:
        """Python's and NumPy's states as JSON in bytes, for a checkpoint; torch's is already a tensor."""
        states = {"random_python": self.python, "random_numpy": self.numpy}
        texts = {name: json.dumps(state, default=lambda value: value.tolist()) for name, state in states.items()}
        return {name: np.frombuffer(text.encode(), np.uint8).copy() for name, text in texts.items()}


def restore_texts(python: NDArray[np.uint8], numpy: NDArray[np.uint8]) -> None:
    """Restore Python's and NumPy's states from `Generators.texts`."""
    version, numbers, gauss = json.loads(python.tobytes())
    random.setstate((version, tuple(numbers), gauss))
    state = json.loads(numpy.tobytes())
    if isinstance(key := state["state"].get("key"), list):
        state["state"]["key"] = np.array(key, np.uint32)
    np.random.set_state(state)


@contextmanager
def kept() -> Iterator[None]:
    """Restore the three generators' states on exit. Use only while no other thread draws."""
    before = Generators.now()
    try:
        yield
    finally:
        before.restore()


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _comparable(part)) for key, part in value.items()]
    return value.tobytes() if isinstance(value, np.ndarray) else value


# -- for threads beside one that draws -------------------------------------------------------------------------
class DrewError(BaseException):
    """Code in a `NoDraws` was about to draw. A BaseException, so that no `except Exception` in user code hides it."""


class NoDraws(TorchDispatchMode):
    """Within the context, in this thread only, raises DrewError before a draw from torch's global generators.

    Other generators may be drawn from. `harmless`: operations known not to draw, shared by all guards.
    """

    def __init__(self, harmless: set[Any]) -> None:
        super().__init__()
        self._harmless = harmless
        self._drew = False

    def run(self, function: Callable[[], Any]) -> Any:
        """`function()`; raises DrewError even if the function caught it."""
        with self:
            value = function()
        if self._drew:
            raise DrewError
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._harmless:
            if torch.Tag.nondeterministic_seeded not in func.tags:
                self._harmless.add(func)
            elif not any(_own_generator(value) for value in (*args, *kwargs.values())):
                self._drew = True
                raise DrewError
        return func(*args, **kwargs)


def _own_generator(value: Any) -> bool:
    """A global generator arrives as a different object, but with the same seed."""
    return isinstance(value, torch.Generator) and value.initial_seed() != torch.initial_seed()
