"""The target loss and metric for comparing runs: given by the user, or the best values that all runs reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpctrain.views.compare.differences import spread
from hpctrain.views.compare.summary import NAN, RunSummary

WINDOW = 0.05  # share of the shortest run's samples over which the training loss is averaged
Summaries = Mapping[str, RunSummary]  # by letter


@dataclass(frozen=True)
class Targets:
    """`loss`: training loss, mean over `window` samples. `metric`: of the evaluations during training. NaN: no target,
    because no run has the value. `notes`: sentences on what the targets are and where they come from."""

    loss: float
    metric: float
    window: float
    notes: tuple[str, ...]


def choose_targets(runs: Summaries, loss: float | None = None, metric: float | None = None) -> Targets:
    """The given targets. None is replaced by the best value of the worst run, which all runs reach."""
    lengths = [run.samples for run in runs.values() if run.samples]
    window = WINDOW * min(lengths, default=0)
    of_loss, loss = _target_loss(runs, loss, window)
    of_metric, metric = _target_metric(runs, metric)
    return Targets(loss, metric, window, (*of_loss, *of_metric))


def _target_loss(runs: Summaries, requested: float | None, window: float) -> tuple[list[str], float]:
    best = {letter: float(run.mean_losses(window)["loss"].min()) for letter, run in runs.items()}
    target, source = _choose(best, requested, max)
    if target != target:
        return ["No run has losses, so there is no time to a loss."], NAN
    return [
        f"Target loss {target:.4g} ({source}): training loss, mean over the last {max(1, round(window)):,} samples; "
        "reached at the first step where it is at most that."
    ], target


def _target_metric(runs: Summaries, requested: float | None) -> tuple[list[str], float]:
    kinds = {(run.metric, run.higher_is_better) for run in runs.values() if len(run.course)}
    if not kinds:
        return ["No run was evaluated while it trained, so there is no time to a metric."], NAN
    if len(kinds) > 1:
        names = " and ".join(sorted(name for name, _ in kinds))
        return [f"The runs have different metrics ({names}), so there is no time to a metric."], NAN
    (name, higher), splits = kinds.pop(), sorted({run.split for run in runs.values()} - {""})
    best, worst = {letter: run.best_metric for letter, run in runs.items()}, min if higher else max
    target, source = _choose(best, requested, worst)
    notes = [
        f"Target {name} {target:.4g} ({source}): of the {' or '.join(splits)} samples; reached at the first evaluation "
        f"where it is {'at least' if higher else 'at most'} that, not interpolated."
    ]
    if len(splits) > 1:
        which = spread({letter: f"{run.split} samples" for letter, run in runs.items() if run.split})
        notes.append(f"Times to {name} are measured on different data: {which}.")
    return notes, target


def _choose(best: dict[str, float], requested: float | None, worst: Callable[..., float]) -> tuple[float, str]:
    """(target, text on where it comes from)."""
    known = {letter: value for letter, value in best.items() if value == value}
    if requested is not None:
        return (requested, "as requested") if known else (NAN, "")
    if not known:
        return NAN, ""
    target = worst(known.values())
    whose = next(letter for letter, value in known.items() if value == target)
    return target, f"the best of {whose}{', the worst run' * (len(known) > 1)}"
