"""Cross-validation of jobs/captions.toml: BLEU by epoch beside captions that no model has made.

    python analysis/captions.py FEATURES.h5            train what docs/captions.csv lacks, then the table and the plot
    python analysis/captions.py FEATURES.h5 --table    only these, from docs/captions.csv

For each of five folds one process trains with the batch of four workers (128), once with the pictures' features and
once without them (all 0): what the model says about no picture in particular. It can be interrupted and goes on where
it stopped. FEATURES.h5 is made as jobs/captions.toml says. Prints the tables of docs/captions.md and draws
docs/captions.png.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import pandas as pd
import torch

from hpctrain.comm.virtual.world import World
from hpctrain.filenames import METRICS
from hpctrain.job import Job
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.vision.baselines import frequent_words, nearest_neighbour
from hpctrain.vision.bleu import bleu
from hpctrain.vision.captions import CaptionSet, PictureSet, captions

ROOT = Path(__file__).parent.parent
JOB, RESULTS, PLOT = ROOT / "jobs" / "captions.toml", ROOT / "docs" / "captions.csv", ROOT / "docs" / "captions.png"
FOLDS, WORKERS = 5, 4
SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "sacreBLEU")
MODEL, BLIND = "model", "model without pictures"
BASELINES: dict[str, Callable[[CaptionSet, PictureSet], list[str]]] = {
    "most frequent words": frequent_words,
    "nearest neighbour": nearest_neighbour,
}
Table = pd.DataFrame


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", metavar="FEATURES.h5", type=Path)
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = pd.read_csv(RESULTS) if RESULTS.exists() else Table()
    for way, fold in [] if options.table else missing(known):
        known = pd.concat([known, result(way, fold, options.features)])
        known.to_csv(RESULTS, index=False, float_format="%.5f")
        print(f"{way}, fold {fold}: done", flush=True)
    means = known.groupby(["way", "epoch"]).mean(numeric_only=True).reset_index()
    print(page(means))
    draw(means)


def missing(known: Table) -> Iterator[tuple[str, int]]:
    """What to compute: way and fold."""
    done = set() if known.empty else set(zip(known["way"], known["fold"], strict=True))
    for way in (*BASELINES, MODEL, BLIND):
        yield from ((way, fold) for fold in range(FOLDS) if (way, fold) not in done)


def result(way: str, fold: int, features: Path) -> Table:
    """Scores of that fold: a row per epoch, or one without an epoch (0)."""
    if way in BASELINES:
        splits = captions(str(features), fold=fold, folds=FOLDS)
        scores = bleu(BASELINES[way](splits.train, splits.validation), splits.validation.captions)
        return Table([{"way": way, "fold": fold, "epoch": 0.0, **scores}])
    with tempfile.TemporaryDirectory() as folder:
        file = features if way == MODEL else without_pictures(features, Path(folder))
        found = trained(file, fold, Path(folder))
    found = found.rename(columns=lambda name: name.removeprefix("metric."))
    return found[["epoch", "loss", *SCORES]].assign(way=way, fold=fold)


def trained(features: Path, fold: int, folder: Path) -> Table:
    """metrics.csv of a run."""
    base = Job.load(JOB, [])
    keys = [f"data.file={features}", f"data.fold={fold}", f"data.folds={FOLDS}", f"output={folder}", "threads=1"]
    keys += [f"train.batch_size={WORKERS * base.train.batch_size}", "trace.enabled=false", "trace.report=false"]
    run = World(1).run(lambda comm: train(base.override(keys), comm, out=Narrator(enabled=False)))[0]
    return pd.read_csv(run.folder / METRICS)


def without_pictures(features: Path, folder: Path) -> Path:
    """The same file, but all features are 0."""
    copy = folder / "blind.h5"
    shutil.copy(features, copy)
    with h5py.File(copy, "r+") as file:
        file["features"][:] = 0
    return copy


def page(means: Table) -> str:
    """Two tables for docs/captions.md: ways at the model's best epoch, and the model by epoch."""
    model = means[means["way"] == MODEL]
    best = float(model["epoch"].iloc[int(model["BLEU-4"].to_numpy().argmax())])
    rows = {f"{way}": means[means["way"] == way].iloc[0] for way in BASELINES}
    for way in (BLIND, MODEL):
        own = means[means["way"] == way]
        if len(own):
            rows[f"{way}, epoch {best:.0f}"] = own[own["epoch"] == best].iloc[0]
            rows[f"{way}, last epoch"] = own.iloc[-1]
    lines = [_line(["", *SCORES]), _line(["---"] * (1 + len(SCORES)))]
    lines += [_line([name, *(f"{row[score]:.3f}" for score in SCORES)]) for name, row in rows.items()]
    lines += ["", _line(["epoch", *SCORES, "loss"]), _line(["---"] * (2 + len(SCORES)))]
    for _, row in model.iterrows():
        lines.append(_line([f"{row['epoch']:.0f}", *(f"{row[name]:.3f}" for name in (*SCORES, "loss"))]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(means: Table) -> None:
    """BLEU-1..4 of the model by epoch; the other ways as lines across."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
    model, blind = (means[means["way"] == way] for way in (MODEL, BLIND))
    for axis, score in zip(axes, SCORES, strict=False):
        axis.plot(model["epoch"], model[score], color="tab:blue", label=MODEL)
        axis.plot(blind["epoch"], blind[score], color="tab:gray", label=BLIND)
        for way, style in zip(BASELINES, (":", "--"), strict=True):
            axis.axhline(means[means["way"] == way][score].iloc[0], color="black", linestyle=style, label=way)
        axis.set(title=score, xlabel="epoch", ylim=(0, None))
    axes[0].set_ylabel("mean of five folds")
    axes[-1].legend(fontsize="small")
    figure.savefig(PLOT, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
