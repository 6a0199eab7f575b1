"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512, algorithm 2): as DiLoCo, but the parameters are exchanged
in fragments, one after the other, while workers go on training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from hpctrain.codecs import CODEC_TEXT, CodecChoice
from hpctrain.replica.state import Own, Section, State
from hpctrain.strategies.interval import ISLAND_TEXT, IslandChoice
from hpctrain.strategies.outer import OuterOptimizer, OuterOptions
from hpctrain.strategies.round import Round, RoundStrategy, Step
from hpctrain.strategies.tuning import USUAL

if TYPE_CHECKING:
    from hpctrain.strategies.exchange import Exchange

VALUES = "streaming/values"  # among a worker's own arrays: its parameters
PROGRESS = "streaming"  # the key of plain numbers
LOST = (
    "what workers have learned since their latest exchanges is lost, because the run resumes with other fragments, on "
    "other nodes, with another kind of memory, or without the optimizer's state"
)


class StreamingDiLoCoOptions(OuterOptions):
    """The keys of strategy.name = "streaming_diloco"."""

    every: int = Field(100, ge=1, description="steps between two outer steps of the same fragment")
    fragments: int = Field(4, ge=1, le=10**4, description="parts of the parameters that are exchanged in turn")
    delay: int = Field(1, ge=0, description="steps for which workers go on training while a fragment is exchanged")
    mix: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="a worker's own share of its parameters after an exchange; the rest is what was agreed on",
    )
    island: IslandChoice = Field("worker", description=ISLAND_TEXT)
    codec: CodecChoice = Field("none", description=CODEC_TEXT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every % self.fragments:
            raise ValueError(
                f"has every = {self.every}, which is not a multiple of fragments = {self.fragments}: one fragment is "
                "exchanged every `every / fragments` steps"
            )
        if self.delay > self.every // self.fragments:
            raise ValueError(
                f"has delay = {self.delay}, but the next fragment is exchanged after {self.every // self.fragments} "
                "steps (every / fragments); lower delay"
            )
        return self


class StreamingDiLoCo(RoundStrategy):
    """A round of every / fragments steps ends with the start of one fragment's exchange. The outer step follows `delay`
    steps later; workers then mix their own parameters with the outcome. The parameters on which all agree, which are
    evaluated and saved, are the outer optimizer's."""

    Options = StreamingDiLoCoOptions
    options: StreamingDiLoCoOptions
    plain = False
    quiet = False
    tested_with = (
        {"every": 4, "fragments": 2},
        {"every": 6, "fragments": 2, "delay": 3, "mix": 0.0, "island": "node"},
        {"every": 3, "fragments": 3, "delay": 0, "codec": "topk", "outer_momentum": 0.0},
    )

    def length(self) -> int:
        return self.options.every // self.options.fragments

    def make_exchange(self) -> Exchange:
        from hpctrain.strategies.exchange import ApartExchange

        codec, size = self.codec_of(self.options.codec), int(USUAL * 2**20)
        return self.between_nodes(codec, size) or ApartExchange(self.phase, codec, size, early=False)

    def begin(self) -> None:
        import torch

        from hpctrain.codecs.options import JOINT
        from hpctrain.replica.layout import slice_bounds
        from hpctrain.replica.tensors import as_array

        low, high, fragments = self.exchange.low, self.exchange.high, self.options.fragments
        elementwise = str(self.options.codec) not in JOINT
        self._cuts = slice_bounds(self.phase.replica.layout, fragments, elementwise)
        here = [min(max(cut, low), high) - low for cut in self._cuts]  # this rank may own nothing of some fragments
        self._fragments = list(zip(here, here[1:], strict=False))
        self.values = self.phase.replica.values[low:high]
        self.outer = OuterOptimizer(self.options, self.values)
        self._kept = torch.empty_like(self.values)
        # Samples since each fragment's last exchange: of this worker or island, and of all.
        self._mine, self._all = [0.0] * fragments, [0.0] * fragments
        self._next, self._pending = 0, -1  # fragments: to be exchanged next, and on its way
        self.outer.section.flat["changes"] = as_array(self.exchange.mean)

    # -- state ------------------------------------------------------------------------------------------------
    def common(self) -> Section:
        return self.outer.section

    def state(self) -> State | None:
        self.exchange.settle()  # what was sent is part of the state, though it is not applied yet
        return super().state()

    def own(self) -> Own:
        from hpctrain.replica.tensors import as_array

        self.exchange.settle()
        own = super().own()
        self._kept.copy_(self.values)
        progress = {"mine": self._mine, "all": self._all, "next": self._next, "pending": self._pending}
        own.arrays[VALUES], own.numbers[PROGRESS] = as_array(self._kept), {**progress, "cuts": self._cuts}
        return own

    def load_own(self, own: Own) -> str | None:
        from hpctrain.replica.tensors import as_tensor

        own = Own(dict(own.arrays), dict(own.numbers))
        values, progress = own.arrays.pop(VALUES, None), own.numbers.pop(PROGRESS, {})
        lost = super().load_own(own)
        fits = values is not None and self._same_place(own) and progress.get("cuts") == self._cuts
        if not all(self.comm.gather_json(fits)):  # without the others' values, this worker's have no right share
            return LOST if lost is None else f"{lost}; {LOST}"
        self.values.copy_(as_tensor(values))
        self._mine, self._all = list(progress["mine"]), list(progress["all"])
        self._next, self._pending = progress["next"], progress["pending"]
        return lost

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The outer optimizer's parameters, in place of this worker's own."""
        self._kept.copy_(self.values)
        self.values.copy_(self.outer.anchor)
        self.exchange.publish()
        yield
        self.exchange.publish()
        self.values.copy_(self._kept)
        self.exchange.publish()

    # -- rounds -----------------------------------------------------------------------------------------------
    @property
    def bucket_bytes(self) -> int:
        """So that the fragment on its way moves on during backward."""
        return int(USUAL * 2**20)

    def before(self) -> None:
        """Nothing to begin: the codec continues at the position at which the fragment on its way was sent."""

    def ready(self, low: int, high: int) -> None:
        """Gradients stay within the island."""

    def local(self, step: Step) -> None:
        self.optimize(step.gradient, step)
        if step.index + 1 >= self.options.delay:
            self._receive()

    def apply(self, round: Round) -> None:
        self._receive()
        self._count(round)
        self._send(self._next, round.start)
        self._next = (self._next + 1) % self.options.fragments
        if not self.options.delay:
            self._receive()

    def drain(self) -> None:
        """Exchange all fragments, so that nothing that workers have learned is lost."""
        self._receive()
        for fragment in range(self.options.fragments):
            if self._all[fragment]:
                self._send(fragment, self.phase.cursor)
                self._receive()
        self.values.copy_(self.outer.anchor)
        self.exchange.publish()

    def _count(self, round: Round) -> None:
        for fragment in range(self.options.fragments):
            self._mine[fragment] += round.share * round.samples
            self._all[fragment] += round.samples

    def _send(self, fragment: int, position: int) -> None:
        """Start to average what the workers' steps have taken away from a fragment, weighted by samples."""
        low, high = self._fragments[fragment]
        share = self._mine[fragment] / self._all[fragment]
        self._mine[fragment] = self._all[fragment] = 0.0
        self.exchange.mean[low:high].copy_(self.outer.anchor[low:high]).sub_(self.values[low:high]).mul_(share)
        self.exchange.begin(position, 1.0)
        self.exchange.start(self.exchange.low + low, self.exchange.low + high)
        self._pending = fragment

    def _receive(self) -> None:
        """Wait for the fragment on its way, if there is one: take the outer step, and mix the outcome in."""
        if self._pending < 0:
            return
        low, high = self._fragments[self._pending]
        self._pending = -1
        self.exchange.settle()
        mean = self.exchange.mean[low:high]
        if self.exchange.check(mean, low):
            self.values[low:high].lerp_(self.outer.step(mean, low, high), 1.0 - self.options.mix)
