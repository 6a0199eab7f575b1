"""The words of `hpctrain predict`; what it does is loaded only when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

THRESHOLD = 0.3  # the least score of a detection


def add_predict(commands: Any) -> None:
    """Add the command to the others (of argparse)."""
    predict = commands.add_parser("predict", help="find objects in pictures with a trained detector, and draw boxes")
    predict.add_argument("run", metavar="RUN", type=Path, help="the run folder of a detector")
    predict.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="picture files")
    predict.add_argument(
        "-o", "--output", metavar="FOLDER", type=Path, required=True, help="for the pictures with boxes: NAME.png"
    )
    predict.add_argument(
        "--threshold", metavar="SCORE", type=float, default=THRESHOLD, help="least score, 0 to 1 (default %(default)s)"
    )
    predict.add_argument("--json", metavar="FILE", type=Path, help="also write the detections to FILE")
    predict.add_argument(
        "--size", metavar="PIXELS", type=int, help="sides of the pictures that the model takes (default: as its data)"
    )
    predict.add_argument("--fit", metavar="pad|stretch", help="as of `hpctrain ingest` (default: as its data)")
    predict.set_defaults(command=_predict)


def _predict(options: argparse.Namespace) -> int:
    from hpctrain.vision.command import PredictRequest, main

    return main(
        PredictRequest(
            options.run, options.pictures, options.output, options.threshold, options.json, options.size, options.fit
        )
    )
