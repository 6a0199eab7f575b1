"""What makes a figure's file a program: python analysis/NAME.py RUN -o figure.png"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError
from hpctrain.views.figures import NothingToShow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hpctrain.analysis import Analysis


def main(draw: Callable[[Analysis], Figure], given: Sequence[str] | None = None) -> None:
    """Draw the run given on the command line (or in `given`) into a file. If that fails, exit with status 2 and a
    one-sentence message."""
    about = sys.modules[draw.__module__].__doc__ or ""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder: runs/NAME-TIMESTAMP")
    parser.add_argument("-o", "--output", metavar="FILE", default=f"{name}.png", help="a .png, .pdf or .svg file")
    options = parser.parse_args(given)
    try:
        _save(draw, options.run, options.output)
    except HpctrainError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.output}")


def _save(draw: Callable[[Analysis], Figure], run: str, output: str) -> None:
    from hpctrain.analysis import Analysis
    from hpctrain.trace import open_run

    if Path(output).suffix not in (".png", ".pdf", ".svg"):
        raise HpctrainError(f"{output}: a figure must be a .png, .pdf or .svg file")
    try:
        figure = draw(Analysis(open_run(run)))
    except NothingToShow as error:
        raise HpctrainError(f"{run}: {error}") from None
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise HpctrainError(f"{output} cannot be written ({error.strerror or error}); choose another place") from None
