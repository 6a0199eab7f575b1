"""The page: fills page.html with its sections, each from the available parts of the analysis."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hpctrain import __version__
from hpctrain.errors import HpctrainError
from hpctrain.text import escaped
from hpctrain.trace.schema import KIND_CODES
from hpctrain.views.figures.style import KIND_COLOURS
from hpctrain.views.report import tables
from hpctrain.views.report.examples import read_examples
from hpctrain.views.report.pictures import draw_pictures, inline
from hpctrain.views.report.spans import collect_spans
from hpctrain.views.report.timeline import row_pixels, timeline_data, timeline_plot

if TYPE_CHECKING:
    from hpctrain.analysis import Analysis

Notify = Callable[[str], None]
LARGEST_PAGE = 4_800_000  # bytes
TIMELINE_BYTES = (300_000, 2_600_000)  # least and most for the timeline's spans, whatever else is on the page


class Part:
    """Runs the functions that make the parts of the page; `left_out` lists those that failed, and why."""

    def __init__(self) -> None:
        self.left_out: list[tuple[str, str]] = []

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, or None if it fails."""
        try:
            return make()
        except HpctrainError as error:
            self.left_out.append((name, str(error)))
        except Exception as error:  # an unusual run (killed early, no steps) must not break the rest of the page
            self.left_out.append((name, f"it could not be computed ({type(error).__name__}: {error})"))
        return None


def render_page(analysis: Analysis, notify: Notify) -> tuple[str, str]:
    """(the page's HTML, the headline)."""
    run, part, folder = analysis.run, Part(), escaped(shlex.quote(str(analysis.run.folder)))
    notify("report: computing where the time went")
    phases = part("phases", lambda: analysis.phases)
    headline = part("headline", lambda: analysis.headline) or "Where the time went could not be computed."
    values: dict[str, Any] = {
        "name": escaped(run.folder.resolve().name),
        "folder": folder,
        "version": __version__,
        "headline": headline,
        "facts": part("facts", lambda: tables.facts(run, phases)) or [],
        "efficiency": part("efficiency", lambda: tables.efficiency(analysis.efficiency)),
        "times": part("times", lambda: tables.times(analysis.times)),
        "device_times": part("device times", lambda: tables.device_times(analysis.device_times)),
        "matrix": part("waiting", lambda: tables.waiting(analysis.waiting_matrix())),
        "traffic": part("traffic", lambda: tables.traffic(analysis.volumes)),
        "metrics": part("metrics", lambda: tables.metrics(run)),
        "examples": part("examples", lambda: read_examples(run)),
        "job": run.job_text,
    }
    found = part("figures", lambda: draw_pictures(analysis, folder, notify))
    pictures, missing = found if found is not None else ([], [])
    values |= {"pictures": pictures, "missing_pictures": missing, "bokeh": bokeh_script(), "style": inline("page.css")}
    values |= {"script": inline("timeline.js"), "colours": KIND_COLOURS}
    size = len(fill(values | {"timeline": None, "notes": run.notes, "left_out": part.left_out}).encode())
    least, most = TIMELINE_BYTES
    budget = max(least, min(most, LARGEST_PAGE - size))
    values["timeline"] = part("timeline", lambda: timeline(analysis, phases, budget, notify))
    # The notes come last because reading more of the run adds to them.
    return fill(values | {"notes": run.notes, "left_out": part.left_out}), headline


def timeline(analysis: Analysis, phases: Any, budget: int, notify: Notify) -> dict[str, Any] | None:
    """The timeline's values for page.html; None for a run without spans."""
    store = collect_spans(analysis.run, budget, notify)
    hidden, spans, seconds = store.hidden
    if not spans:
        return None
    notify("report: writing the page")
    data = timeline_data(analysis.run, phases, store)
    codes = {int(code) for spans, _ in store.rows for code in np.unique(spans.columns["kind"])}
    content = {"plot": json.loads(timeline_plot(store)), "data": data, "rowPixels": row_pixels(len(store.rows))}
    return {
        "data": as_json(content),
        "kinds": [kind for kind in KIND_COLOURS if KIND_CODES[kind] in codes],
        "marks": sorted({(mark["kind"], mark["colour"]) for mark in data["marks"]["events"]}),
        "marks_left_out": data["marks"]["left_out"],
        "spans": spans,
        "hidden": hidden,
        "hidden_s": seconds,
        "quantum_us": store.quantum_ns // 1000,
        "many": len(store.rows) > 8,
    }


def as_json(content: Any) -> Markup:
    """`content` as JSON for a <script type="application/json">, escaped so that it cannot end the element."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def bokeh_script() -> Markup:
    """BokehJS itself, to be embedded in the page."""
    from bokeh.resources import Resources

    return Markup("\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw))


def fill(values: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("hpctrain.views.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(values)
