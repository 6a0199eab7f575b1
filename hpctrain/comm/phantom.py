"""Buffers that hold no memory: they have a length and a dtype, so their messages cost what real ones do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

NO_VALUES = "a buffer that holds no memory has no values"


class Phantom(NDArrayOperatorsMixin):
    """A one-dimensional buffer of `size` elements of `dtype` whose values do not exist.

    It can be sliced, copied and viewed as another dtype. Writing to it changes nothing. Reading a value raises
    TypeError: what a strategy decides by must lie in an arena with share="board", or come through torch
    (`replica.blocks`).
    """

    __slots__ = ("dtype", "nbytes", "size")
    ndim = 1

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.size, self.dtype = size, dtype
        self.nbytes = size * dtype.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def shape(self) -> tuple[int]:
        """Its length, as NumPy has it."""
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Phantom:
        if place is Ellipsis:
            return self
        if not isinstance(place, slice):
            raise TypeError(NO_VALUES)
        return Phantom(len(range(*place.indices(self.size))), self.dtype)

    def __setitem__(self, place: Any, value: Any) -> None:
        return None

    def copy(self) -> Phantom:
        """Itself: nothing can change it."""
        return self

    def view(self, dtype: Any) -> Phantom:
        """The same bytes as another dtype."""
        other = np.dtype(dtype)
        return Phantom(self.nbytes // other.itemsize, other)

    def astype(self, dtype: Any, copy: bool = True) -> Phantom:
        """As many elements of another dtype."""
        return Phantom(self.size, np.dtype(dtype))

    def reshape(self, *shape: Any) -> Phantom:
        """Itself: phantoms are flat."""
        return self

    def __bool__(self) -> bool:
        raise TypeError(NO_VALUES)

    def __array__(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError(NO_VALUES)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, out: Any = None, **named: Any) -> Any:
        return self if out is None else out[0]

    def __array_function__(self, function: Any, types: Any, arguments: Any, named: dict[str, Any]) -> Any:
        if function is np.empty_like or function is np.zeros_like:
            shape = named.get("shape") or (self.size,)
            return Phantom(int(np.prod(shape)), np.dtype(named.get("dtype") or self.dtype))
        return NotImplemented


def deliver(out: Any, into: Any) -> None:
    """Copy the values of a message into the start of its receiver's buffer, if it has values."""
    if isinstance(out, Phantom):
        return
    if out.size == into.size:
        into[...] = out
    else:
        into[: out.size] = out
