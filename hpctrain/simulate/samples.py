"""Single measurements of costs, and the lines through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev

from hpctrain.simulate.calibration import NO_CODEC, MeasuredCost

PASSES = ("data", "forward", "backward")  # their costs depend on samples, those of other spans on bytes
CODED = ("encode", "decode", "reduce")  # their costs depend on the codec

Points = dict[float, list[float]]
"""Seconds of one core by how much was done (samples or bytes)."""


@dataclass
class Samples:
    """Seconds of one core by what was done (a span's kind; with a codec, for some kinds) and how much of it. `codec`:
    of what is measured next."""

    codec: str = NO_CODEC
    seen: dict[tuple[str, str], Points] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, kind: str, n: float, seconds: float) -> None:
        """One measurement."""
        self.seen[self.codec if kind in CODED else NO_CODEC, kind][n].append(seconds)

    def cost(self, kind: str) -> MeasuredCost:
        """Of a kind without a codec."""
        return line_through(self.seen.get((NO_CODEC, kind), {}))

    def spans(self) -> dict[str, MeasuredCost]:
        """What was measured besides passes, by kind."""
        kinds = sorted(kind for _, kind in self.seen if kind not in (*CODED, "forward", "backward"))
        return {kind: self.cost(kind) for kind in kinds}

    def codecs(self) -> dict[str, dict[str, MeasuredCost]]:
        """The same by codec."""
        found: dict[str, dict[str, MeasuredCost]] = {}
        for codec, kind in sorted(self.seen):
            if kind in CODED:
                found.setdefault(codec, {})[kind] = line_through(self.seen[codec, kind])
        return found


def line_through(points: Points) -> MeasuredCost:
    """The line through the medians (least squares, relative), with no negative part; what was measured for one amount
    only costs in proportion to it."""
    kept = {n: _trimmed(values) for n, values in sorted(points.items())}
    if not kept:
        return MeasuredCost()
    fixed, each = _line([(n, median(values), len(values)) for n, values in kept.items()])
    means = [(fmean(values), values) for values in kept.values()]
    spread = fmean(pstdev(values) / mean if mean else 0.0 for mean, values in means)
    return MeasuredCost(fixed_s=fixed, each_s=each, least=min(kept), most=max(kept), spread=spread)


def _trimmed(values: Sequence[float]) -> list[float]:
    """Without the slowest tenth, which is of the machine's other work."""
    kept = sorted(values)
    return kept[: max(1, len(kept) - len(kept) // 10)]


def _line(points: Iterable[tuple[float, float, int]]) -> tuple[float, float]:
    """(fixed, each) of the line that fits points (n, seconds, weight) best, relative to the seconds."""
    found = [(n, y, w / max(y, 1e-9) ** 2) for n, y, w in points]
    if len(found) == 1 or found[-1][0] == found[0][0]:
        n, y, _ = found[0]
        return (0.0, y / n) if n else (y, 0.0)
    total = sum(w for _, _, w in found)
    x, y = (sum(w * point[at] for *point, w in found) / total for at in (0, 1))
    across = sum(w * (n - x) ** 2 for n, _, w in found)
    each = max(0.0, sum(w * (n - x) * (s - y) for n, s, w in found) / across)
    fixed = y - each * x
    if fixed >= 0:
        return fixed, each
    squares = sum(w * n * n for n, _, w in found)
    return 0.0, sum(w * n * s for n, s, w in found) / squares
