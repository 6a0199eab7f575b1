"""report.html: the results from a run's traces on one page that opens offline.

`write_report(run_folder)` writes it. Importing this package loads neither pandas, matplotlib nor bokeh.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.filenames import REPORT
from hpctrain.output import output_file
from hpctrain.views.progress import Progress


def write_report(run_folder: Path | str, path: Path | str | None = None) -> tuple[Path, str]:
    """Write the report of a run to `path` (default: report.html in its folder); returns (path, headline).

    Parts that cannot be computed or drawn for this run are left out, and the page says why. Progress goes to stderr if
    it takes longer than two seconds. Raises TraceError if the folder is not a run or nothing in it can be read,
    HpctrainError if the page cannot be written.
    """
    from hpctrain.analysis import analyse
    from hpctrain.views.report.page import render_page

    analysis = analyse(run_folder)
    target = Path(path) if path is not None else analysis.run.folder / REPORT
    with output_file(target) as unfinished:
        unfinished.touch()  # check that the page can be written before doing the work
        with Progress() as notify:
            page, headline = render_page(analysis, notify)
        unfinished.write_text(page, encoding="utf-8")
    return target, headline
