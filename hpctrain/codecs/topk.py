"""The largest elements of each chunk, and their places (top-k: Aji and Heafield 2017; in chunks as in SparseLoCo, Sarfi
et al. 2025, so that messages have a fixed length and no chunk is left out)."""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.codecs.options import CHUNK
from hpctrain.codecs.sparse import LONGEST, FullValues, SparseCodec, ValueForm, kept, largest
from hpctrain.codecs.wire import wide_dtype
from hpctrain.replica.blocks import row_blocks

KEEP = 0.01
FIRST, PARTS = 0.25, 4  # of the warm-up: the share that is kept at first, and how often it changes


class TopK(SparseCodec):
    """A share of `keep` of each chunk of `unit` elements, those of the largest magnitude; the others become 0.

    An element of a message takes 4 bytes for a float32 and 2 for its place in the chunk: 1 % is 66 times less than
    everything. `unit` is at most 32,768.

    In the first `warmup` samples of the run more is kept: a share of 25 % at first, which falls exponentially in four
    parts, each with messages of one length (Deep Gradient Compression: Lin et al. 2018, section 3.3).
    """

    def __init__(
        self, keep: float = KEEP, chunk: int = CHUNK, form: ValueForm | None = None, warmup: int = 0
    ) -> None:
        if not 0 < keep <= 1 or not 0 < chunk <= LONGEST:
            raise ValueError(f"keep must be above 0 and at most 1, a chunk 1 to {LONGEST}; given: {keep:g}, {chunk}")
        super().__init__(chunk, form or FullValues())
        self._keep, self._warmup, self._position = keep, warmup, 0

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position

    @property
    def keep(self) -> float:
        """The share that is kept now."""
        if self._position >= self._warmup:
            return self._keep
        begun = max(self._keep, FIRST)
        return begun * (self._keep / begun) ** (self._position * PARTS // self._warmup / PARTS)

    def count(self, width: int) -> int:
        return kept(self.keep, width)

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        wide = wide_dtype(values)
        for elements, rows in row_blocks(values, self.unit):
            given = values[elements].to(wide).view(rows.stop - rows.start, -1)
            places = largest(given.abs(), self.count(given.shape[1]))
            chosen = given.gather(1, places)
            written = self.records.write(message[self.where(rows, given.shape[1], values)], chosen, places)
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
            records = message[self.where(rows, here.shape[1], into)]
            values, places = self.records.read(records, chunks, self.count(here.shape[1]), wide)
            if add:
                values.add_(here.gather(1, places))  # here, because 16 bits are rounded once
            else:
                here.zero_()
            here.scatter_(1, places, values.to(into.dtype))
