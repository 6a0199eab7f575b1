"""The largest elements of each chunk, and their places (top-k: Aji and Heafield 2017; in chunks as in SparseLoCo, Sarfi
et al. 2025, so that messages have a fixed length and no chunk is left out)."""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.codecs.sparse import LONGEST, FullValues, Records, ValueForm, kept, largest
from hpctrain.codecs.wire import WireCodec, wide_dtype
from hpctrain.replica.blocks import row_blocks

CHUNK = 4096  # elements
KEEP = 0.01


class TopK(WireCodec):
    """A share of `keep` of each chunk of `unit` elements, those of the largest magnitude; the others become 0.

    An element of a message takes 4 bytes for a float32 and 2 for its place in the chunk: 1 % is 66 times less than
    everything. `unit` is at most 32,768.
    """

    remembers = True

    def __init__(self, keep: float = KEEP, chunk: int = CHUNK, form: ValueForm | None = None) -> None:
        if not 0 < keep <= 1 or not 0 < chunk <= LONGEST:
            raise ValueError(f"keep must be above 0 and at most 1, a chunk 1 to {LONGEST}; given: {keep:g}, {chunk}")
        self.unit = chunk
        self._keep, self._records = keep, Records(form or FullValues())

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        whole, last = divmod(values.numel(), self.unit)
        return whole * self._bytes(self.unit, values) + bool(last) * self._bytes(last, values), torch.uint8

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        wide = wide_dtype(values)
        for elements, rows in row_blocks(values, self.unit):
            given = values[elements].to(wide).view(rows.stop - rows.start, -1)
            places = largest(given.abs(), kept(self._keep, given.shape[1]))
            chosen = given.gather(1, places)
            written = self._records.write(message[self._where(rows, given.shape[1], values)], chosen, places)
            if rest is not None:
                if rest is not values:
                    rest[elements].copy_(values[elements])
                left = torch.where(written.isfinite(), chosen - written, chosen)
                rest[elements].view(given.shape).scatter_(1, places, left.to(rest.dtype))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        wide = wide_dtype(into)
        for elements, rows in row_blocks(into, self.unit):
            chunks = rows.stop - rows.start
            here = into[elements].view(chunks, -1)
            records = message[self._where(rows, here.shape[1], into)]
            values, places = self._records.read(records, chunks, kept(self._keep, here.shape[1]), wide)
            if add:
                values.add_(here.gather(1, places))  # here, because 16 bits are rounded once
            else:
                here.zero_()
            here.scatter_(1, places, values.to(into.dtype))

    def _bytes(self, width: int, values: Tensor) -> int:
        return self._records.nbytes(kept(self._keep, width), wide_dtype(values))

    def _where(self, rows: slice, width: int, values: Tensor) -> slice:
        """Where the records of these chunks of `width` elements are in the message."""
        begin = rows.start * self._bytes(self.unit, values)
        return slice(begin, begin + (rows.stop - rows.start) * self._bytes(width, values))
