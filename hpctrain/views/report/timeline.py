"""The interactive timeline: the data for the page's timeline.js. Bokeh provides axes, zoom and drawing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hpctrain.trace import Run
from hpctrain.trace.schema import KINDS, THREADS
from hpctrain.views.figures.style import KIND_COLOURS
from hpctrain.views.report.marks import collect_marks, collect_phases
from hpctrain.views.report.spans import SpanStore

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource

ROW_PIXELS = (7, 22)  # least and most height of a rank's row
ROWS_PIXELS = 700  # height of all rows together beyond which they are made lower


def timeline_data(run: Run, phases: Any, store: SpanStore) -> dict[str, Any]:
    """Everything except the axes, for timeline.js. `phases`: Analysis.phases, or None.

    Times are seconds since the run's first span.
    """
    rows = []
    for spans, packed in store.rows:
        about = run.attributes(spans.rank)
        rows.append(
            {
                "rank": spans.rank,
                "label": f"rank {spans.rank} {THREADS.get(spans.lane, '').removesuffix(' thread')}".rstrip(),
                "node": int(about.get("node", 0)),
                "host": str(about.get("host", "")),
                "role": _roles(phases, spans.rank, str(about.get("role", ""))) if spans.lane == 0 else "",
                "count": packed.count,
                "first": packed.first,
                "planes": packed.planes,
                "data": packed.base64(),
            }
        )
    rows.sort(key=lambda row: (row["node"], row["rank"]))  # stable: lanes stay in order
    return {
        "quantum": store.quantum_ns / 1e9,
        "kinds": KINDS,
        "colours": [KIND_COLOURS[kind] for kind in KINDS],
        "order": [KINDS.index(kind) for kind in KIND_COLOURS],
        "rows": rows,
        "phases": collect_phases(run, phases),
        "marks": collect_marks(run),
    }


def _roles(phases: Any, rank: int, first: str) -> str:
    """The rank's roles in the order of the phases: "worker", "worker, server"; `first` if they are unknown."""
    if phases is None or not (phases["rank"] == rank).any():
        return first
    return ", ".join(phases.loc[phases["rank"] == rank, "role"].unique())


def row_pixels(rows: int) -> int:
    """Height of a row in CSS pixels if there are `rows` rows."""
    least, most = ROW_PIXELS
    return max(least, min(most, ROWS_PIXELS // max(1, rows)))


def extent(store: SpanStore) -> tuple[float, float]:
    """Seconds from the run's first span to the start of the first and the end of the last span drawn."""
    filled = [spans.columns for spans, _ in store.rows if len(spans)]
    start = min((int(columns["start"].min()) for columns in filled), default=0)
    end = max((int(columns["end"].max()) for columns in filled), default=1)
    return start * store.quantum_ns / 1e9, max(end, start + 1) * store.quantum_ns / 1e9


def timeline_plot(store: SpanStore, width: int = 1000) -> str:
    """Bokeh's document for the axes, as JSON: an image for the spans, quads for phases, marks for events; all empty.

    Vertical coordinates are CSS pixels from the bottom of the lowest row.
    """
    import numpy as np
    from bokeh.embed import json_item
    from bokeh.models import BasicTickFormatter, BoxZoomTool, FixedTicker, PanTool, Range1d, ResetTool, WheelZoomTool
    from bokeh.plotting import figure

    start, end = extent(store)
    margin = 0.01 * (end - start)
    bounds = (start - margin, end + margin)
    wheel = WheelZoomTool(dimensions="width")
    plot = figure(
        name="timeline",
        x_range=Range1d(
            start=bounds[0], end=bounds[1], bounds=bounds, min_interval=min(4 * store.quantum_ns / 1e9, end - start)
        ),
        y_range=Range1d(start=0, end=100),
        x_axis_label="time since the run's first span (s)",
        tools=[PanTool(dimensions="width"), wheel, BoxZoomTool(dimensions="width"), ResetTool()],
        active_scroll=wheel,
        sizing_mode="stretch_width",
        height=400,
        width=width,
        output_backend="canvas",
    )
    plot.toolbar.logo = None
    plot.grid.visible = False
    plot.outline_line_color = None
    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.yaxis.axis_line_color = None
    plot.yaxis.major_tick_line_color = None
    plot.xaxis.formatter = BasicTickFormatter(use_scientific=False)
    empty = np.zeros((1, 1), np.uint32)
    plot.image_rgba(
        image="image", x="x", y="y", dw="dw", dh="dh", name="spans",
        source={"image": [empty], "x": [start], "y": [0], "dw": [end - start], "dh": [1]},
    )  # fmt: skip
    bands = _nothing("left", "right", "bottom", "top", "color")
    plot.quad("left", "right", "top", "bottom", color="color", line_color="white", source=bands, name="phases")
    names = _nothing("x", "y", "text")
    plot.text("x", "y", text_font_size="11px", text_baseline="middle", source=names, name="names")
    lines = _nothing("x0", "x1", "y0", "y1")
    plot.segment("x0", "y0", "x1", "y1", color="black", line_dash="dotted", source=lines, name="switches")
    marks = _nothing("x", "y", "marker", "color")
    plot.scatter("x", "y", size=11, marker="marker", color="color", line_color="white", source=marks, name="marks")
    return json.dumps(json_item(plot))


def _nothing(*columns: str) -> ColumnDataSource:
    """An empty source with these columns, which the page fills."""
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({name: [] for name in columns})
