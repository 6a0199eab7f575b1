"""8 or 4 bits on the wire, rounded at random so that the mean is right (QSGD: Alistarh et al. 2017, section 3)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from hpctrain.codecs.wire import WireCodec, typed, wide_dtype
from hpctrain.replica.blocks import all_finite, row_blocks

BLOCK = 2048  # elements per scale
SLACK = 1 + 2.0**-20  # the largest value of a block stays below the last level, whatever is rounded on the way


class Clock:
    """The position that a codec and those for other places share."""

    position = 0


class Draws:
    """Random numbers for one message after another: see `Codec.position`."""

    def __init__(self, seed: int, place: tuple[int, ...] = (), clock: Clock | None = None) -> None:
        self._seed, self._place, self.clock = seed, place, clock or Clock()
        self._seen, self._messages = 0, 0

    def elsewhere(self, place: tuple[int, ...]) -> Draws:
        """Those for another place, with the same clock."""
        return Draws(self._seed, (*self._place, *place), self.clock)

    def next(self) -> np.random.SFC64:
        """Those of the next message."""
        if self._seen != self.clock.position:
            self._seen, self._messages = self.clock.position, 0
        self._messages += 1
        return np.random.SFC64(np.random.SeedSequence(self._seed, spawn_key=(*self._place, self._seen, self._messages)))


class Quantised(WireCodec):
    """Each block of `unit` elements has a step, its largest magnitude by `levels`; each element is a whole number of
    steps, one of the two nearest to it, at random: E[decoded] = values.

    A message begins with a step for each block (float32; float64 for float64 values). Scaled by the largest magnitude,
    not by the norm as in the paper, whose few levels served its variable-length code. Of a block with values that are
    not finite only these arrive, so that they are found where they are.

    Random numbers are NumPy's SFC64, seeded anew for each message. That is several times faster than torch's generator,
    so numbers need not be used twice, and no two elements share any. Of an
    element's 16 bits 15 are used, so a mean is off by at most 2^-16 step, as much as rounding to float32 adds between
    64 and 127; with 8 bits it would be 1/512.
    """

    levels: ClassVar[int]  # on each side of 0

    def __init__(self, block: int = BLOCK, seed: int = 0) -> None:
        self.unit = block
        self._draws = Draws(seed)

    @property
    def position(self) -> int:
        return self._draws.clock.position

    @position.setter
    def position(self, position: int) -> None:
        self._draws.clock.position = position

    def seeded(self, *place: int) -> Self:
        other = type(self)(self.unit)
        other._draws = self._draws.elsewhere(place)
        return other

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        whole, last = divmod(values.numel(), self.unit)
        codes = whole * self.row(self.unit) + self.row(last)
        return (whole + bool(last)) * wide_dtype(values).itemsize + codes, torch.uint8

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        random, wide = self._draws.next(), wide_dtype(values)
        steps, codes = self._parts(message, values)
        for elements, rows in row_blocks(values, self.unit):
            given = values[elements].to(wide).view(rows.stop - rows.start, -1)
            step = given.abs().amax(1, keepdim=True).mul_(SLACK / self.levels).clamp_(min=torch.finfo(wide).tiny)
            steps[rows].copy_(step.view(-1))
            whole = (given * step.reciprocal()).add_(_noise(random, given), alpha=2.0**-16).round_()
            if not all_finite(step):
                whole = whole.where(step.isfinite(), given.isfinite().logical_not_().to(wide))
            self.pack(whole, self._codes(codes, rows, given.shape[1]))
            if rest is not None:
                rest[elements].copy_((given - _times(whole, step)).view(-1))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        wide = wide_dtype(into)
        steps, codes = self._parts(message, into)
        for elements, rows in row_blocks(into, self.unit):
            width = min(self.unit, elements.stop - elements.start)
            whole = self.unpack(self._codes(codes, rows, width), width, wide)
            found = _times(whole, steps[rows].view(-1, 1)).view(-1)
            if add:
                into[elements].add_(found)
            else:
                into[elements].copy_(found)

    @abstractmethod
    def row(self, width: int) -> int:
        """The number of bytes that `width` elements of a block take."""

    @abstractmethod
    def pack(self, whole: Tensor, codes: Tensor) -> None:
        """Write whole numbers, (rows, width), into `codes`, (rows, row(width)), int8."""

    @abstractmethod
    def unpack(self, codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The whole numbers, (rows, width), in new memory."""

    def _parts(self, message: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The message's steps and its codes."""
        wide = wide_dtype(values)
        end = -(-values.numel() // self.unit) * wide.itemsize
        return typed(message[:end], wide), message[end:].view(torch.int8)

    def _codes(self, codes: Tensor, rows: slice, width: int) -> Tensor:
        begin = rows.start * self.row(self.unit)
        count = rows.stop - rows.start
        return codes[begin : begin + count * self.row(width)].view(count, -1)


class Int8(Quantised):
    """8 bits: whole numbers from -127 to 127."""

    levels = 127

    def row(self, width: int) -> int:
        return width

    def pack(self, whole: Tensor, codes: Tensor) -> None:
        codes.copy_(whole)

    def unpack(self, codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


class Int4(Quantised):
    """4 bits: whole numbers from -7 to 7. A byte is low + 16 * high, where the high ones are the second half of a
    block, so that halves are converted as a whole."""

    levels = 7

    def row(self, width: int) -> int:
        return -(-width // 2)

    def pack(self, whole: Tensor, codes: Tensor) -> None:
        half = codes.shape[1]
        low, high = whole[:, :half], whole[:, half:]
        pairs = low.clone()
        pairs[:, : high.shape[1]].add_(high, alpha=16)
        codes.copy_(pairs)

    def unpack(self, codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        half = codes.shape[1]
        whole = torch.empty(codes.shape[0], width, dtype=dtype, device=codes.device)
        pairs = codes.to(dtype)
        high = (pairs * (1 / 16)).round_()  # exact: low ones are at most 7
        torch.sub(pairs, high, alpha=16, out=whole[:, :half])
        whole[:, half:].copy_(high[:, : width - half])
        return whole


def _times(whole: Tensor, step: Tensor) -> Tensor:
    """The decoded values, in the memory of `whole` if possible. In a block whose step is not finite, 0 stays 0."""
    return whole.mul_(step) if all_finite(step) else whole.where(whole == 0, whole * step)


def _noise(random: np.random.SFC64, like: Tensor) -> Tensor:
    """Uniform odd numbers between -2^15 and 2^15: symmetric, and never half a step, which would round to even."""
    count = like.numel()
    bits = random.random_raw(-(-count // 4)) | np.uint64(0x0001000100010001)
    return torch.from_numpy(bits.view(np.int16)[:count]).to(like.device, like.dtype).view(like.shape)
