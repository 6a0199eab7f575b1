"""How runs scale against a baseline: speed-up, scaling efficiency, computation scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpctrain.analysis.efficiency import computation_scaling

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.views.compare.summary import RunSummary

MEASURES = ("speed_up", "scaling_efficiency", "computation_scaling")


def scaling(run: RunSummary, baseline: RunSummary) -> dict[str, float]:
    """The MEASURES of a run, for strong scaling. Speed-up: the baseline's training seconds per sample / the run's;
    scaling efficiency: speed-up / ratio of ranks, servers included; computation scaling (POP): the baseline's useful
    computation per sample / the run's."""
    faster = run.samples_per_s / baseline.samples_per_s if baseline.samples_per_s > 0 else float("nan")
    useful = computation_scaling(baseline.useful_s_per_sample, run.useful_s_per_sample)
    return dict(zip(MEASURES, (faster, faster * baseline.ranks / run.ranks, float(useful)), strict=True))


def curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split the comparison `frame` into a frame per strategy, with its runs sorted by number of ranks.

    A parameter server with colocated servers counts as a different strategy from one with dedicated ranks for them.
    """
    ways: dict[str, list[Any]] = {}
    for index, strategy, colocated in frame[["strategy", "colocated"]].itertuples():
        ways.setdefault(f"{strategy}, colocated" if colocated else strategy, []).append(index)
    return {way: frame.loc[rows].sort_values("ranks", kind="stable") for way, rows in ways.items()}
