"""A few elements of each chunk: which are the largest, how they and their places are written, and what codecs that send
them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hpctrain.codecs.bits import pack_bits, unpack_bits
from hpctrain.codecs.wire import WireCodec, wide_dtype

LONGEST = 2**15  # elements of a chunk: a place fits into 16 bits
GROUP = 8  # elements whose maximum is looked at first


class ValueForm(ABC):
    """How the chosen values of a chunk are written; they are float32, or float64."""

    @abstractmethod
    def nbytes(self, count: int, dtype: torch.dtype) -> int:
        """The bytes of `count` values of a chunk."""

    @abstractmethod
    def write(self, values: Tensor) -> Tensor:
        """`values`, (chunks, count), as bytes: uint8, (chunks, nbytes)."""

    @abstractmethod
    def read(self, written: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The values of what `write` gave, (chunks, count)."""


class FullValues(ValueForm):
    """As they are."""

    def nbytes(self, count: int, dtype: torch.dtype) -> int:
        return count * dtype.itemsize

    def write(self, values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8)

    def read(self, written: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return _cast(written, dtype)


class TwoBitValues(ValueForm):
    """In two bits: the sign, and which of the chunk's two magnitudes (as SparseLoCo, Sarfi et al. 2025, but for the
    choice of the magnitudes). They are the means of what lies above and below the mean magnitude; an empty half has 0.
    """

    def nbytes(self, count: int, dtype: torch.dtype) -> int:
        return 2 * dtype.itemsize + -(-count // 4)

    def write(self, values: Tensor) -> Tensor:
        magnitudes = values.abs()
        high = magnitudes > (magnitudes * (1 / values.shape[1])).sum(1, keepdim=True)
        levels = torch.cat([_mean(magnitudes, ~high), _mean(magnitudes, high)], 1)
        bits = torch.cat([torch.signbit(values), high], 1)
        return torch.cat([levels.view(torch.uint8), pack_bits(bits)], 1)

    def read(self, written: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        end = 2 * dtype.itemsize
        low, high = _cast(written[:, :end], dtype).split(1, 1)
        bits = unpack_bits(written[:, end:])
        magnitudes = torch.where(bits[:, count : 2 * count], high, low)
        return torch.where(bits[:, :count], -magnitudes, magnitudes)


class Records:
    """What a message holds of each chunk: values in that form, then their places in the chunk, 16 bits each. A record
    may begin at any byte."""

    def __init__(self, form: ValueForm) -> None:
        self._form = form

    def nbytes(self, count: int, dtype: torch.dtype) -> int:
        """The bytes of a record of `count` values."""
        return self._form.nbytes(count, dtype) + 2 * count

    def write(self, message: Tensor, values: Tensor, places: Tensor) -> Tensor:
        """Write the records of several chunks, (chunks, count), into these bytes. Returns the values to be read."""
        written = self._form.write(values)
        message.view(len(values), -1).copy_(torch.cat([written, places.to(torch.int16).view(torch.uint8)], 1))
        return self._form.read(written, values.shape[1], values.dtype)

    def read(self, message: Tensor, chunks: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(values, places), each (chunks, count), of these bytes."""
        records, end = message.view(chunks, -1), self._form.nbytes(count, dtype)
        places = _cast(records[:, end:], torch.int16)
        return self._form.read(records[:, :end], count, dtype), places.to(torch.int64)


class SparseCodec(WireCodec):
    """Sends a record of each chunk of `unit` elements; a shorter last chunk has a shorter one."""

    remembers = True

    def __init__(self, unit: int, form: ValueForm) -> None:
        self.unit = unit
        self.records = Records(form)

    @abstractmethod
    def count(self, width: int) -> int:
        """How many values are sent of a chunk of `width` elements."""

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        whole, last = divmod(values.numel(), self.unit)
        return whole * self._nbytes(self.unit, values) + bool(last) * self._nbytes(last, values), torch.uint8

    def where(self, rows: slice, width: int, values: Tensor) -> slice:
        """Where the records of these chunks of `width` elements are in the message."""
        begin = rows.start * self._nbytes(self.unit, values)
        return slice(begin, begin + (rows.stop - rows.start) * self._nbytes(width, values))

    def _nbytes(self, width: int, values: Tensor) -> int:
        return self.records.nbytes(self.count(width), wide_dtype(values))


def kept(keep: float, width: int) -> int:
    """How many of a chunk's `width` elements are kept: the nearest to a share of `keep`, at least one."""
    return max(1, round(keep * width))


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """The places of the `count` largest elements of each row, in any order; NaN is larger than all.

    For a few of many it is torch.topk twice: first on the maxima of groups of 8 elements, since the largest elements
    lie in the groups with the largest maxima, then on the elements of as many groups. That is faster than torch.topk on
    everything, and much faster than NumPy's argpartition.
    """
    rows, width = magnitudes.shape
    if width % GROUP or 2 * count * GROUP > width:
        return magnitudes.topk(count, dim=1, sorted=False).indices
    stride = width // GROUP  # a group's elements are that far apart: maxima of neighbours are slow to find
    groups = magnitudes.view(rows, GROUP, stride).amax(1).topk(count, dim=1, sorted=False).indices
    steps = torch.arange(0, width, stride, device=magnitudes.device).view(1, GROUP, 1)
    places = (groups.unsqueeze(1) + steps).view(rows, -1)
    best = magnitudes.gather(1, places).topk(count, dim=1, sorted=False).indices
    return places.gather(1, best)


def _cast(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of a matrix of bytes as another dtype. A copy: they need not begin at a multiple of its size."""
    return columns.clone(memory_format=torch.contiguous_format).view(dtype)


def _mean(magnitudes: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen elements of each row, (rows, 1); 0 if there are none, not finite if one is not."""
    count = chosen.sum(1, keepdim=True).clamp_(min=1)
    return (magnitudes / count).where(chosen, torch.zeros_like(magnitudes)).sum(1, keepdim=True)
