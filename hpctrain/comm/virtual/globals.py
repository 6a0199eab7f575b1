"""What a process has once and each virtual rank for itself: torch's modes of a thread, and the global generators of
torch (on the CPU), NumPy and Python. (One exception: if NumPy has cached the second of a pair of normal numbers, it is
lost when another rank runs.)
"""

from __future__ import annotations

import _random
import ctypes
import random
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.random import mtrand

Modes = tuple[bool, bool, Any]
"""Whether gradients are recorded, whether autocast is on, and its dtype."""

Generators = tuple[Any, Any, Any]
"""The state of torch's generator, that of Python's, and NumPy's bit generator itself."""


class PythonState(ABC):
    """Takes and restores the state of Python's global generator."""

    @abstractmethod
    def take(self) -> Any:
        """The state."""

    @abstractmethod
    def put(self, state: Any) -> None:
        """Restore it."""


class AskedState(PythonState):
    """By the module's functions, which build a tuple of 625 numbers: 20 us where caches are cold."""

    def take(self) -> Any:
        return random.getstate()

    def put(self, state: Any) -> None:
        random.setstate(state)


class CopiedState(PythonState):
    """By copying the generator's numbers, which lie behind the head of its object in CPython."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        head = object.__basicsize__
        self._numbers = (ctypes.c_char * (_random.Random.__basicsize__ - head)).from_address(id(generator) + head)

    def take(self) -> Any:
        return self._numbers.raw, self._generator.gauss_next  # type: ignore[attr-defined]

    def put(self, state: Any) -> None:
        self._numbers.raw, self._generator.gauss_next = state  # type: ignore[attr-defined]

    def works(self) -> bool:
        """Whether what lies there is the state of this interpreter's generators. Leaves it as it was."""
        generator, before = self._generator, self._generator.getstate()
        generator.random()
        here = self.take()
        wanted = generator.random(), generator.gauss(0.0, 1.0), generator.gauss(0.0, 1.0)
        generator.seed(0)
        self.put(here)
        found = generator.random(), generator.gauss(0.0, 1.0), generator.gauss(0.0, 1.0)
        generator.setstate(before)
        return found == wanted


def python_state() -> PythonState:
    """The fastest way that works in this interpreter."""
    trial = CopiedState(random.Random(1))
    return CopiedState(random._inst) if trial.works() else AskedState()


class Globals:
    """`torch`: the module."""

    def __init__(self, torch: Any) -> None:
        self._torch, self._python = torch, python_state()

    def modes(self) -> Modes:
        """The current ones."""
        torch = self._torch
        autocast = torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled(), autocast, torch.get_autocast_dtype("cpu") if autocast else None

    def set_modes(self, modes: Modes) -> None:
        """Restore them."""
        torch, (grad, autocast, dtype) = self._torch, modes
        if torch.is_grad_enabled() != grad:
            torch._C._set_grad_enabled(grad)
        if autocast or torch.is_autocast_enabled("cpu"):
            torch.clear_autocast_cache()  # of casts of the other task's weights
            torch.set_autocast_enabled("cpu", autocast)
            if dtype is not None:
                torch.set_autocast_dtype("cpu", dtype)

    def generators(self) -> Generators:
        """The current states. NumPy's goes on changing: it is exchanged, not copied."""
        return self._torch.default_generator.get_state(), self._python.take(), mtrand.get_bit_generator()

    def copied(self) -> Generators:
        """The same, with a copy of NumPy's."""
        torch, python, numpy = self.generators()
        copy = type(numpy)()
        copy.state = numpy.state
        return torch, python, copy

    def set_generators(self, states: Generators) -> None:
        """Restore them."""
        torch, python, numpy = states
        self._torch.default_generator.set_state(torch)
        self._python.put(python)
        if mtrand.get_bit_generator() is not numpy:
            mtrand.set_bit_generator(numpy)


class GlobalsBefore:
    """Everything as it was when this was made, for `restore`."""

    def __init__(self, known: Globals) -> None:
        self._known, self._modes, self._generators = known, known.modes(), known.generators()
        self._numpy = np.random.get_state(legacy=False)

    def restore(self) -> None:
        """Restore it."""
        self._known.set_modes(self._modes)
        self._known.set_generators(self._generators)
        np.random.set_state(self._numpy)
