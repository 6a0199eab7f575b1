"""Matrices of low rank: PowerSGD (Vogels, Karimireddy and Jaggi 2019, algorithms 1 and 2) and ACP-SGD (Zhang et al.
2023)."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpctrain.codecs.base import Addend
from hpctrain.codecs.joint import JointAddend, JointCodec
from hpctrain.codecs.wire import wide_dtype
from hpctrain.replica.blocks import row_blocks
from hpctrain.replica.layout import Slot
from hpctrain.replica.tensors import as_array

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hpctrain.comm.base import Request

RANK = 2


@dataclass(frozen=True)
class LowRankShape:
    """A parameter as a matrix, `rows` (its first dimension) x `columns` (the others). `rank`: of what is sent of it;
    0: it is sent as it is, because it is a vector or low rank saves nothing."""

    rows: int
    columns: int
    rank: int

    @property
    def most(self) -> int:
        """The highest rank with which the factors have fewer elements than the matrix."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)

    @property
    def left(self) -> int:
        """Elements of P^T, (rank, rows)."""
        return self.rows * self.rank

    @property
    def right(self) -> int:
        """Elements of Q^T, (rank, columns)."""
        return self.columns * self.rank


@dataclass(frozen=True)
class MatrixPart:
    """A parameter that is sent by its factors. `matrix`: its values, a view of (rows, columns); `rest` the same of the
    rest; `memory`: see `JointCodec.memory`.

    `left`, `right`: P^T, (rank, rows), and Q^T, (rank, columns). Products with narrow matrices that are stored like are
    several times faster.
    """

    shape: LowRankShape
    matrix: Tensor
    rest: Tensor | None
    memory: Tensor

    def multiply(self, right: Tensor, left: Tensor) -> None:
        """P becomes M Q."""
        torch.mm(right, self._wide(self.matrix).T, out=left)

    def multiply_transposed(self, left: Tensor, right: Tensor) -> None:
        """Q becomes M^T P."""
        torch.mm(left, self._wide(self.matrix), out=right)

    def leave_out(self, left: Tensor, right: Tensor) -> None:
        """The rest becomes M - P Q^T."""
        if self.rest is None:
            return
        for rows in self._rows():
            given, rest, factor = self.matrix[rows], self.rest[rows], left[:, rows].T
            if rest.dtype == left.dtype:
                torch.addmm(given, factor, right, alpha=-1, out=rest)
            else:
                rest.copy_(torch.addmm(self._wide(given), factor, right, alpha=-1))

    def arrive(self, left: Tensor, right: Tensor) -> None:
        """The matrix becomes P Q^T."""
        for rows in self._rows():
            here, factor = self.matrix[rows], left[:, rows].T
            if here.dtype == left.dtype:
                torch.mm(factor, right, out=here)
            else:
                here.copy_(factor @ right)

    def _rows(self) -> Iterator[slice]:
        """Blocks that stay in cache."""
        return (rows for _, rows in row_blocks(self.matrix.view(-1), self.shape.columns))

    @staticmethod
    def _wide(values: Tensor) -> Tensor:
        """In the dtype of messages; no copy if they have that."""
        return values.to(wide_dtype(values))


class LowRank(JointCodec):
    """Sends two factors of each matrix instead of the matrix: it arrives as P Q^T, with P (rows, rank) and Q (columns,
    rank). Vectors, and matrices for which that is not less, are summed as they are. Everything is computed and sent in
    the dtype of the values, at least float32; what a stretch sends in a stage is one message.

    What a rank's own factors leave out of its own values is added to its next values (error feedback). Summed over the
    ranks that is what the sum of the factors leaves out of the sum of the values, as it is in PowerSGD's algorithm 2.
    There each rank subtracts the mean that all ranks get; here its own share of it, as in ACP-SGD: training is the
    same, but the rests do not grow with the difference between the ranks.

    Each rank orthogonalises for itself, from equal sums. Ranks end with the same bits if their matrix products and QR
    decompositions round alike: on one kind of processor, with as many threads.
    """

    remembers = True

    def __init__(self, rank: int = RANK, seed: int = 0) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1; given: {rank}")
        self._rank, self._seed = rank, seed

    def shape(self, slot: Slot) -> LowRankShape:
        """How a parameter is sent."""
        rows = max(1, slot.shape[0]) if len(slot.shape) > 1 else 1
        columns = slot.size // rows
        rank = min(self._rank, rows, columns)
        return LowRankShape(rows, columns, rank if rank * (rows + columns) < rows * columns else 0)

    def unfit(self, slots: Sequence[Slot]) -> str | None:
        """If it compresses no parameter; matrices that are too small for the rank are else sent as they are."""
        if any(self.shape(slot).rank for slot in slots):
            return None
        shapes = {slot.name: self.shape(slot) for slot in slots}
        name, shape = max(shapes.items(), key=lambda pair: pair[1].most, default=("", LowRankShape(1, 1, 0)))
        if shape.most == 0:
            return "the model has no matrix that low rank makes smaller; use another codec"
        return (
            f"rank {self._rank} makes no parameter of the model smaller: for {name}, a matrix of {shape.rows} x "
            f"{shape.columns}, it must be at most {shape.most}; set codec.rank, or use another codec"
        )

    def reduce(self, addend: Addend) -> Iterator[list[Request]]:
        if addend.comm.size == 1:
            return iter(())
        assert isinstance(addend, JointAddend)
        return self._sum(addend, *self._given(addend))

    @abstractmethod
    def _sum(
        self, addend: JointAddend, matrices: Sequence[MatrixPart], vectors: Sequence[Tensor]
    ) -> Iterator[list[Request]]:
        """As `reduce`; the rest of what came before is in the values."""

    def _given(self, addend: JointAddend) -> tuple[list[MatrixPart], list[Tensor]]:
        """The addend's matrices and its flat vectors, after the rest has been added to both. Of vectors there is no
        other."""
        values, rest = addend.values, addend.rest
        if rest is not None:
            values.add_(rest, alpha=addend.carry)
        matrices, vectors = list[MatrixPart](), list[Tensor]()
        for slot, memory in zip(addend.slots, addend.memory, strict=True):
            here, shape = slice(slot.offset, slot.offset + slot.size), self.shape(slot)
            if shape.rank:
                left_out = rest[here].view(shape.rows, -1) if rest is not None else None
                matrices.append(MatrixPart(shape, values[here].view(shape.rows, -1), left_out, memory))
            else:
                vectors.append(values[here])
                if rest is not None:
                    rest[here].zero_()
        return matrices, vectors

    def _random(self, slot: Slot, length: int, dtype: torch.dtype) -> Tensor:
        """Normally distributed numbers that belong to the parameter of that name."""
        random = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {slot.name}".encode()))
        return torch.randn(length, generator=random, dtype=torch.promote_types(dtype, torch.float32))

    @staticmethod
    def _message(
        addend: JointAddend, turn: int, matrices: Sequence[MatrixPart], vectors: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A message with P^T (turn 1: Q^T) of each matrix, then the vectors; these factors; these vectors."""
        lengths = [(part.shape.left, part.shape.right)[turn] for part in matrices]
        message = addend.scratch(
            "PQ"[turn], sum(lengths) + sum(vector.numel() for vector in vectors), wide_dtype(addend.values)
        )
        parts = message.split(lengths + [vector.numel() for vector in vectors])
        factors = [flat.view(part.shape.rank, -1) for flat, part in zip(parts, matrices, strict=False)]
        return message, factors, list(parts[len(matrices) :])

    @staticmethod
    def _span(
        addend: JointAddend, kind: str, message: Tensor, matrices: Sequence[MatrixPart]
    ) -> AbstractContextManager[object]:
        """Of one product with each matrix."""
        flops = sum(2.0 * part.matrix.numel() * part.shape.rank for part in matrices)
        return addend.comm.span(kind, message.nbytes, flops=flops)


class PowerSGD(LowRank):
    """Two all-reduces: P = sum of M Q, orthogonalised, then Q = sum of M^T P, from which the next sum starts (warm
    start). An element of a matrix takes rank (1 / rows + 1 / columns) of what it takes without a codec."""

    stages: ClassVar[int] = 2

    def memory(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """Q^T, with rows of any length; at first random."""
        return self._random(slot, self.shape(slot).right, dtype)

    def _sum(
        self, addend: JointAddend, matrices: Sequence[MatrixPart], vectors: Sequence[Tensor]
    ) -> Iterator[list[Request]]:
        message, lefts, summed = self._message(addend, 0, matrices, vectors)
        with self._span(addend, "encode", message, matrices):
            for part, left in zip(matrices, lefts, strict=True):
                part.multiply(part.memory.view(part.shape.rank, -1), left)
            _copy(vectors, summed)
        yield [addend.comms[0].start_all_reduce(as_array(message))]
        _copy(summed, vectors)
        if not matrices:
            return
        message, rights, _ = self._message(addend, 1, matrices)
        with self._span(addend, "encode", message, matrices):
            for part, left, right in zip(matrices, lefts, rights, strict=True):
                left.copy_(orthonormal(left))
                part.multiply_transposed(left, right)
            sent = [right.clone() for right in rights]
        requests = [addend.comms[1].start_all_reduce(as_array(message))]
        with self._span(addend, "encode", message, matrices):  # while it is on its way
            for part, left, right in zip(matrices, lefts, sent, strict=True):
                part.leave_out(left, right)
        yield requests
        with self._span(addend, "decode", message, matrices):
            for part, left, right in zip(matrices, lefts, rights, strict=True):
                part.arrive(left, right)
                keep(right, part.memory)


class AlternatingPowerSGD(LowRank):
    """ACP-SGD: one all-reduce, of P = sum of M Q and of Q = sum of M^T P in turn. The other factor is the one that
    arrived last, orthogonalised, so it need not be sent."""

    stages: ClassVar[int] = 1

    def memory(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """P^T, then Q^T, with rows of any length; at first random."""
        shape = self.shape(slot)
        return self._random(slot, shape.left + shape.right, dtype)

    def _sum(
        self, addend: JointAddend, matrices: Sequence[MatrixPart], vectors: Sequence[Tensor]
    ) -> Iterator[list[Request]]:
        turn = addend.number % 2  # 0: P is sent, Q is known; 1: Q is sent, P is known
        addend.number += 1
        kept = [part.memory.split([part.shape.left, part.shape.right]) for part in matrices]
        message, factors, summed = self._message(addend, turn, matrices, vectors)
        with self._span(addend, "encode", message, matrices):
            others = [
                orthonormal(both[1 - turn].view(part.shape.rank, -1)) for part, both in zip(matrices, kept, strict=True)
            ]
            for part, factor, other in zip(matrices, factors, others, strict=True):
                if turn:
                    part.multiply_transposed(other, factor)
                else:
                    part.multiply(other, factor)
            _copy(vectors, summed)
            sent = [factor.clone() for factor in factors]
        requests = [addend.comms[0].start_all_reduce(as_array(message))]
        with self._span(addend, "encode", message, matrices):  # while it is on its way
            for part, factor, other in zip(matrices, sent, others, strict=True):
                part.leave_out(*((other, factor) if turn else (factor, other)))
        yield requests
        with self._span(addend, "decode", message, matrices):
            _copy(summed, vectors)
            for part, factor, other, both in zip(matrices, factors, others, kept, strict=True):
                part.arrive(*((other, factor) if turn else (factor, other)))
                keep(factor, both[turn])


def orthonormal(factor: Tensor) -> Tensor:
    """An orthonormal basis, (rank, n), of a space that contains the rows of `factor`: its QR decomposition. Unlike Gram
    and Schmidt's process, as in the papers, it makes a basis of dependent rows and of zeros, too."""
    return torch.linalg.qr(factor.T).Q.T.contiguous()


def keep(factor: Tensor, memory: Tensor) -> None:
    """Store the rows of `factor`, (rank, n), in the flat `memory`, each divided by its largest magnitude, so that
    products with them stay in range. Where a row is 0, as of a parameter that never had a gradient, or not finite, the
    old one stays: nothing could be learned from zeros."""
    largest = factor.abs().amax(1, keepdim=True)
    known = memory.view(factor.shape)
    known.copy_(torch.where((largest > 0) & torch.isfinite(largest), factor / largest, known))


def _copy(given: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for source, target in zip(given, into, strict=True):
        target.copy_(source)
