"""Codecs whose messages have a fixed length, and the sum over ranks that works for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpctrain.codecs.base import Addend, Codec
from hpctrain.codecs.feedback import Feedback
from hpctrain.comm.algorithms import even_bounds
from hpctrain.comm.base import Tag
from hpctrain.replica.blocks import blocks
from hpctrain.replica.tensors import as_array

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator, Request


class WireCodec(Codec):
    """Writes values into a message of a fixed length, and reads it again. `feedback`: what makes up for what messages
    leave out, if the codec remembers."""

    stages = 2
    feedback: Feedback = Feedback()

    @abstractmethod
    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        """The length and the dtype of the message for values like these."""

    def nbytes(self, values: Tensor) -> int:
        """The bytes of the message for values like these: exact, and all that is sent."""
        length, dtype = self.shape(values)
        return length * dtype.itemsize

    @abstractmethod
    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        """Write `values` into `message`, whose storage begins at a multiple of 8 bytes.

        `rest`: flat, with the length and dtype of `values`, may be `values` itself: gets the values minus what the
        message decodes to. Values that are not finite make the decoded message not finite, too, in one place at least;
        in `rest` they are where they were, and nothing else is.
        """

    @abstractmethod
    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        """Store the values of a message in `into` or, with `add`, add them to it."""

    def total(self, messages: Sequence[Tensor], into: Tensor) -> None:
        """Store the sum of the messages in `into`. Values of 16 bits are rounded once, after the last."""
        total = into if into.element_size() > 2 else torch.empty_like(into, dtype=torch.float32)
        for number, message in enumerate(messages):
            self.decode(message, total, add=number > 0)
        if total is not into:
            into.copy_(total)

    def reduce(self, addend: Addend) -> Iterator[list[Request]]:
        """Two ranks send each other everything: no other way takes fewer bytes, and this has a single stage. More ranks
        sum a slice each and send its sum to the others, rounded; their own copy is rounded, too. With a codec that
        remembers, which would leave out most of a sum, they also send everything to all."""
        if addend.comm.size == 1:
            return iter(())
        return self._to_all(addend) if addend.comm.size == 2 or self.remembers else self._scatter_and_gather(addend)

    def _to_all(self, addend: Addend) -> Iterator[list[Request]]:
        comm, values, me = addend.comm, addend.values, addend.comm.rank
        others = [rank for rank in range(comm.size) if rank != me]
        messages = {rank: addend.scratch(f"in {rank}", *self.shape(values)) for rank in others}
        requests = [comm.start_recv(as_array(messages[rank]), rank, Tag.PART) for rank in others]
        messages[me] = self._outgoing(addend, "out", values, addend.rest)
        if addend.rest is not None:
            self.feedback.written(addend, self, messages[me])
        yield requests + [comm.start_send(as_array(messages[me]), rank, Tag.PART) for rank in _in_turn(comm)]
        count = len(messages)
        with comm.span("decode", count * messages[me].nbytes, flops=float(count * values.numel())):
            self.total([messages[rank] for rank in range(count)], values)  # in the same order on all ranks
            if addend.rest is not None:
                self.feedback.arrived(addend)
                addend.begun = True

    def _scatter_and_gather(self, addend: Addend) -> Iterator[list[Request]]:
        comm, me = addend.comm, addend.comm.rank
        slices = [addend.values[low:high] for low, high in pairwise(even_bounds(addend.values.numel(), comm.size))]
        own, others = slices[me], [rank for rank in range(comm.size) if rank != me]
        parts = {rank: addend.scratch(f"part {rank}", *self.shape(own)) for rank in others}
        requests = [comm.start_recv(as_array(parts[rank]), rank, Tag.PART) for rank in others]
        for rank in _in_turn(comm):
            message = self._outgoing(addend, f"to {rank}", slices[rank])
            requests.append(comm.start_send(as_array(message), rank, Tag.PART))
        yield requests
        self._add(addend, own, [parts[rank] for rank in others])
        sums = {rank: addend.scratch(f"sum {rank}", *self.shape(slices[rank])) for rank in others}
        requests = [comm.start_recv(as_array(sums[rank]), rank, Tag.SUM) for rank in others]
        message = self._outgoing(addend, "own sum", own)
        requests += [comm.start_send(as_array(message), rank, Tag.SUM) for rank in _in_turn(comm)]
        yield requests
        with comm.span("decode", sum(part.nbytes for part in sums.values())):
            for rank in others:
                self.decode(sums[rank], slices[rank])
            self.decode(message, own)

    def _add(self, addend: Addend, own: Tensor, parts: list[Tensor]) -> None:
        """Add the messages to this rank's slice, in rank order. Values of 16 bits are rounded once, after the last."""
        with addend.comm.span("decode", sum(part.nbytes for part in parts), flops=float(own.numel() * len(parts))):
            total = own.float() if own.element_size() == 2 else own
            for part in parts:
                self.decode(part, total, add=True)
            if total is not own:
                own.copy_(total)

    def _outgoing(self, addend: Addend, name: str, values: Tensor, rest: Tensor | None = None) -> Tensor:
        """The message of these values, and of `rest`, which gets what it leaves out."""
        message = addend.scratch(name, *self.shape(values))
        codec = addend.own(self)
        assert isinstance(codec, WireCodec)
        with addend.comm.span("encode", message.nbytes):
            if rest is not None:
                self.feedback.mix(addend)
            codec.encode(values, message, rest)
        return message


class Plain(WireCodec):
    """The values as they are: a copy."""

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        return values.numel(), values.dtype

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        message.copy_(values)
        if rest is not None:
            rest.zero_()

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        if add:
            into.add_(message)
        else:
            into.copy_(message)


def typed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of a message of bytes as another dtype. An empty one may have no stride, which torch refuses."""
    return part.view(dtype) if part.numel() else part.new_empty(0, dtype=dtype)


def wide_dtype(values: Tensor) -> torch.dtype:
    """What codecs compute in: the dtype of the values, at least float32."""
    return torch.promote_types(values.dtype, torch.float32)


def add_wide(values: Tensor, into: Tensor, scale: Tensor | None = None) -> None:
    """Add `values`, times `scale` if given, to `into`. Values of 16 bits are converted block by block, in a core's
    cache: torch's addition of tensors of two dtypes is three times slower."""
    dtype = wide_dtype(into)
    for block in blocks(into):
        wide = values[block].to(dtype)
        into[block].add_(wide if scale is None else wide.mul_(scale))


def _in_turn(comm: Communicator) -> list[int]:
    """The other ranks, beginning with the next one: if all ranks sent to the same one first, its link would be full and
    those of the others idle."""
    return [(comm.rank + step) % comm.size for step in range(1, comm.size)]
