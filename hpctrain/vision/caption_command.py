"""The commands `hpctrain features` and `hpctrain caption`. Imports torch only when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

WEIGHTS = "the net's weights (default: those of its package)"


def add_captions(commands: Any) -> None:
    """Add the commands to the others (of argparse)."""
    features = commands.add_parser("features", help="compute once what a net sees in each picture (docs/captions.md)")
    features.add_argument("captions", metavar="CAPTIONS.h5", type=Path, help="made by `hpctrain ingest captions`")
    features.add_argument("out", metavar="OUT.h5", type=Path, help="the file to make")
    features.add_argument(
        "--backbone", default="efficientnet_lite0", metavar="NAME", help="%(default)s (default) or vgg16"
    )
    features.add_argument("--weights", metavar="FILE", type=Path, help=WEIGHTS)
    features.add_argument(
        "-n", type=int, metavar="N", help="processes that compute (default: one per core); under mpirun, ranks do"
    )
    features.set_defaults(command=_features)
    caption = commands.add_parser("caption", help="describe pictures with a run's model (docs/captions.md)")
    caption.add_argument("run", metavar="RUN", type=Path, help="the run folder of a captioner")
    caption.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="picture files")
    caption.add_argument(
        "--beam", type=int, default=3, metavar="WIDTH", help="of the search; 1: greedy (default %(default)s)"
    )
    caption.add_argument("--weights", metavar="FILE", type=Path, help=WEIGHTS)
    caption.set_defaults(command=_caption)


def _features(options: argparse.Namespace) -> int:
    from hpctrain.vision.features import Extraction, main

    return main(Extraction(options.captions, options.out, options.backbone, options.weights, options.n))


def _caption(options: argparse.Namespace) -> int:
    from hpctrain.vision.caption import main

    return main(options.run, options.pictures, options.beam, options.weights)
