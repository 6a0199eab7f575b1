"""report.html: written for every readable run, self-contained, and with a timeline that works in a browser."""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.errors import HpctrainError, TraceError
from hpctrain.trace import Kind, open_run
from hpctrain.views.figures.style import KIND_COLOURS
from hpctrain.views.report import write_report
from hpctrain.views.report.spans import PackedSpans, Spans, SpanStore, collect_spans
from tests.browser import CHROMIUM, MISSING, Page
from tests.traces import HandMade

STEP = (("data", 0.4), ("forward", 2.0), ("backward", 3.0), ("send", 0.2), ("reduce", 0.5), ("wait", 1.0),
        ("update", 0.7), ("wait", 0.3))  # fmt: skip


def train(folder: Path, ranks: int, steps: int, **options: Any) -> Path:
    """An all-reduce run, 8 spans per step of about 8 ms with noise; rank 1 is slow, the other ranks wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    with HandMade(folder, ranks, **options) as run:
        for rank, trace in run.ranks.items():
            trace.phase(0.0, 0, "worker", "all_reduce")
            now, noise = 0.5, random.gamma(20.0, 1 / 20.0, (steps, len(STEP)))
            for step in range(steps):
                for place, (kind, length) in enumerate(STEP):
                    long = length * noise[step, place] * (2.0 if rank == 1 and place in (1, 2) else 1.0)
                    end = now + (24.0 * (step + 1) - now if place == len(STEP) - 1 else long)
                    peer = (rank + 1) % ranks if kind == "send" else 1 if kind == "wait" and rank != 1 else -1
                    trace.span(kind, now, max(now, end), step, 4096 if kind == "send" else 0, peer)
                    now = max(now, end)
                trace.done(now, step, loss=2.0 / (1 + step / 100), samples=32, cursor=32 * ranks * (step + 1))
            trace.event(now, "checkpoint", "000000001000.safetensors")
    return folder


def section(path: Path, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', path.read_text(), re.S)
    assert found, name
    return found[0]


def payload(path: Path) -> dict[str, Any]:
    """The data of the page's timeline."""
    found = re.search(r'<script type="application/json" id="timeline-data">(.*?)</script>', path.read_text(), re.S)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 3 ranks on 2 nodes, 60 steps, with a metric, and with a note: rank 3's file is missing."""
    folder = train(tmp_path_factory.mktemp("run") / "digits-1", 4, 60, nodes=[0, 0, 1, 1], missing=(3,))
    (folder / "metrics.csv").write_text("step,samples,epoch,seconds,split,loss,metric\n60,7680,1.0,0.9,test,1.25,0.5\n")
    path, _ = write_report(folder)
    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, for tests that do not need them: they take most of the time."""
    monkeypatch.setattr("hpctrain.views.figures.FIGURES", ())


# -- the page ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_figures")
def test_report_is_in_the_run_folder_and_its_headline_is_returned(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", 2, 5)
    path, headline = write_report(folder)
    assert path == folder / "report.html"
    assert headline
    assert html.escape(headline, quote=False) in html.unescape(path.read_text()).replace("&", "&amp;")
    assert not list(folder.glob("*.part"))


@pytest.mark.usefixtures("no_figures")
def test_report_can_be_written_elsewhere(tmp_path: Path) -> None:
    path, _ = write_report(train(tmp_path / "run", 1, 3), tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.usefixtures("no_figures")
def test_unwritable_output_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(HpctrainError, match="cannot be written .*choose another"):
        write_report(train(tmp_path / "run", 1, 3), tmp_path / "no" / "page.html")


def test_folder_that_is_not_a_run_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="not a run folder"):
        write_report(tmp_path)


def test_page_fetches_nothing(report: Path) -> None:
    own = re.sub(r"<script>.*?</script>", "", report.read_text(), flags=re.S)  # Bokeh's own text is run below
    assert not re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?(?!#|data:)[^"'\s>]+""", own)
    assert "@import" not in own
    assert not re.findall(r"url\((?!['\"]?(?:#|data:))", own)


def test_small_run_has_a_small_page(report: Path) -> None:
    assert report.stat().st_size < 3_000_000


def test_every_section_is_present(report: Path) -> None:
    found = re.findall(r'<section id="([\w-]+)"', report.read_text())
    assert found == ["notes", "facts", "efficiency", "timeline-section", "waiting", "figures", "metrics", "job"]


def test_missing_rank_is_noted_at_the_top(report: Path) -> None:
    notes = re.search(r'<section id="notes".*?</section>', report.read_text(), re.S)
    assert notes and "rank 3 of 4: no trace file" in notes[0]


def test_facts_name_ranks_nodes_strategy_and_samples(report: Path) -> None:
    facts = html.unescape(section(report, "facts"))
    for fact in ("4 (3 of them traced)", "2 (host0, host1)", "phase 0: all_reduce, 3 workers", "7,680"):
        assert fact in facts


def test_each_efficiency_term_has_its_formula(report: Path) -> None:
    terms = section(report, "efficiency")
    assert re.search(r"<td[^>]*>all_reduce</td>", terms)
    assert "mean(U) / max(U)" in terms and "max(U) / T" in terms and "mean(U) / T" in terms


def test_metrics_and_the_job_are_on_the_page(report: Path) -> None:
    assert "<td>1.25</td>" in section(report, "metrics")
    assert 'model = "mlp"' in html.unescape(section(report, "job"))


def test_figures_are_images_with_their_commands(report: Path) -> None:
    figures = section(report, "figures")
    names = re.findall(r'<figure id="figure-(\w+)"', figures)
    assert "efficiency" in names
    assert figures.count('<img src="data:image/') == len(names)
    assert f"python analysis/efficiency.py {report.parent} -o efficiency.png" in figures


def test_figure_with_nothing_to_show_says_why(report: Path) -> None:
    missing = section(report, "figures").split("Not drawn for this run")[1]
    assert "staleness: " in missing


def test_broken_figure_does_not_break_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hpctrain.views.figures.efficiency as figure

    monkeypatch.setattr("hpctrain.views.figures.FIGURES", ("efficiency",))
    monkeypatch.setattr(figure, "draw", lambda analysis: 1 / 0)
    path, _ = write_report(train(tmp_path / "run", 2, 4))
    assert "efficiency: it could not be drawn (ZeroDivisionError" in section(path, "figures")
    assert "Which rank waited for which" in path.read_text()


@pytest.mark.usefixtures("no_figures")
def test_trace_contents_cannot_become_markup(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1, job='name = "<script>alert(1)</script>"\n') as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("forward", 0.0, 2.0, step=0)
        run[0].event(1.0, "failure", "</script><script>alert(2)</script>")
        run[0].done(2.0, step=0)
    text = write_report(tmp_path)[0].read_text()
    assert "<script>alert" not in text
    assert "\\u003cscript>alert(2)" in text


@pytest.mark.usefixtures("no_figures")
def test_page_with_too_many_spans_states_its_resolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpctrain.views.report.page.TIMELINE_BYTES", (2000, 2000))
    path, _ = write_report(train(tmp_path / "run", 2, 300))
    note = re.search(r"Times are rounded to (\d+) µs.*?([\d,]+) spans shorter", section(path, "timeline-section"), re.S)
    assert note and float(note[1]) == pytest.approx(1e6 * payload(path)["data"]["quantum"])
    rows = payload(path)["data"]["rows"]
    assert sum(row["count"] for row in rows) == 2 * 300 * 8 - int(note[2].replace(",", ""))
    assert sum(len(row["data"]) for row in rows) <= 2000


# -- odd runs ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_figures")
def test_report_of_a_run_killed_before_its_first_step(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("data", 0.0, 1.0, step=0)
        run[0].kill()
    path, _ = write_report(tmp_path)
    notes = section(path, "notes")
    assert "rank 0 of 2: trace not closed" in notes
    assert 'id="timeline"' in path.read_text()


@pytest.mark.usefixtures("no_figures")
def test_report_of_a_run_without_spans(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2):
        pass
    path, _ = write_report(tmp_path)
    assert "No spans were recorded" in section(path, "timeline-section")
    assert "none finished" in section(path, "facts")


@pytest.mark.usefixtures("no_figures")
def test_resumed_run_is_one_timeline(tmp_path: Path) -> None:
    for attempt, start in ((1, 0.0), (2, 50.0)):
        with HandMade(tmp_path, 1, attempt=attempt) as run:
            run[0].phase(start, 0, "worker", "all_reduce")
            run[0].span("forward", start, start + 2.0, step=attempt)
            run[0].done(start + 2.0, step=attempt)
    path, _ = write_report(tmp_path)
    data = payload(path)["data"]
    assert [row["count"] for row in data["rows"]] == [2]
    assert [phase["text"] for phase in data["phases"]] == ["phase 0: all_reduce", "phase 0: all_reduce, attempt 2"]
    assert "resumed 1 time" in section(path, "facts")


@pytest.mark.usefixtures("no_figures")
def test_server_thread_of_a_worker_has_its_own_row(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "parameter_server (sync)")
        run[0].span("forward", 0.0, 2.0, step=0)
        run[0].span("update", 0.5, 1.5, step=0, lane=1)
        run[0].done(2.0, step=0)
    labels = [row["label"] for row in payload(write_report(tmp_path)[0])["data"]["rows"]]
    assert labels == ["rank 0", "rank 0 server"]


@pytest.mark.usefixtures("no_figures")
def test_row_names_the_roles_of_its_rank(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for phase, roles in enumerate((("worker", "worker"), ("worker", "server"))):
            for rank, role in enumerate(roles):
                at = 10.0 * phase
                run[rank].phase(at, phase, role, "parameter_server (sync)")
                run[rank].span("forward" if role == "worker" else "recv", at, at + 4.0, step=phase)
                if role == "worker":
                    run[rank].done(at + 4.0, step=phase, phase=phase)
    assert [row["role"] for row in payload(write_report(tmp_path)[0])["data"]["rows"]] == ["worker", "worker, server"]


@pytest.mark.usefixtures("no_figures")
def test_phases_and_events_are_marked_once_for_all_ranks(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for trace in run.ranks.values():
            for phase, name in enumerate(("all_reduce", "parameter_server (async)")):
                at = 10.0 * phase
                trace.phase(at, phase, "worker", name)
                trace.span("forward", at, at + 4.0, step=phase)
                trace.done(at + 4.0, step=phase, phase=phase)
            trace.event(9.0, "switch", "the loss is stable")
    data = payload(write_report(tmp_path)[0])["data"]
    assert [phase["text"] for phase in data["phases"]] == ["phase 0: all_reduce", "phase 1: parameter_server (async)"]
    assert [phase["start"] for phase in data["phases"]] == pytest.approx([0.0, 0.010])
    [mark] = data["marks"]["events"]
    assert (mark["kind"], mark["text"], mark["ranks"]) == ("switch", "the loss is stable", [0, 1])
    assert mark["t"] == pytest.approx(0.009)


# -- packing the spans -----------------------------------------------------------------------------------------------
def unpack(spans: PackedSpans) -> list[tuple[int, ...]]:
    """Unpack spans as the page does: (start, end, kind, step, peer, bytes), times in quanta."""
    data = np.frombuffer(zlib.decompress(spans.data), np.uint8)
    kinds, at, columns = data[: spans.count], spans.count, []
    for place, planes in enumerate(spans.planes):
        length = spans.count - 1 if place == 0 else spans.count
        part = data[at : at + planes * length].reshape(planes, length).astype(np.int64)
        columns.append((part << (8 * np.arange(planes))[:, None]).sum(axis=0))
        at += planes * length
    gap, by_kind, step, peer, nbytes = columns
    durations = np.empty(spans.count, np.int64)
    durations[np.argsort(kinds, kind="stable")] = by_kind
    starts = spans.first + np.concatenate([[0], np.cumsum(gap + durations[:-1])])
    steps = np.cumsum(np.where(step % 2, -(step + 1) // 2, step // 2))
    rows = (starts, starts + durations, kinds, steps, peer - 1, nbytes)
    return list(zip(*(row.tolist() for row in rows), strict=True))


def test_spans_come_back_as_they_were_packed(tmp_path: Path) -> None:
    rows = [("data", 0.0, 1.0, 0, 0, -1), ("send", 1.5, 3.25, 0, 70_000, 2), ("wait", 3.25, 3.5, 0, 0, 1),
            ("update", 300.0, 301.0, 7, 0, -1), ("trace", 301.0, 301.125, -1, 0, -1)]  # fmt: skip
    with HandMade(tmp_path, 3, missing=(1, 2)) as run:
        for kind, start, end, step, nbytes, peer in rows:
            run[0].span(kind, start, end, step, nbytes, peer)
    [(_, packed)] = collect_spans(open_run(tmp_path), 100_000).rows
    expected = [(round(s * 1000), round(e * 1000), int(Kind[kind.upper()]), step, peer, nbytes)
                for kind, s, e, step, nbytes, peer in rows]  # fmt: skip
    assert unpack(packed) == expected


def test_coarser_grid_keeps_many_spans_within_the_budget(tmp_path: Path) -> None:
    run = open_run(train(tmp_path / "run", 2, 400))
    fine, coarse = collect_spans(run, 10**9), collect_spans(run, 4000)
    assert fine.quantum_ns == 1000 and fine.size() > 4000
    assert coarse.size() <= 4000
    assert coarse.quantum_ns > fine.quantum_ns
    hidden, spans, seconds = coarse.hidden
    assert spans == fine.hidden[1] and hidden > 0 and seconds > 0


def test_coarsening_afterwards_equals_reading_with_the_coarse_grid(tmp_path: Path) -> None:
    run = open_run(train(tmp_path / "run", 1, 200))
    coarse = collect_spans(run, 1000)
    assert coarse.quantum_ns > 500_000  # coarse enough for spans to vanish
    again = SpanStore(10**9, coarse.quantum_ns)
    [(_, _, block)] = run.blocks("spans", 0)
    spans = Spans(0, 0)
    spans.append(block, run.start_ns, coarse.quantum_ns)
    again.add([spans], 1.0)
    assert unpack(again.rows[0][1]) == unpack(coarse.rows[0][1])
    assert again.hidden[:2] == coarse.hidden[:2]


def test_coarse_grid_preserves_time_by_kind(tmp_path: Path) -> None:
    """Spans shorter than the grid vanish or grow to it, so that each kind keeps its total time."""
    run = open_run(train(tmp_path / "run", 1, 2000))
    coarse = collect_spans(run, 6000)
    columns = coarse.rows[0][0].columns
    truth = run.spans(0)
    for kind in ("forward", "backward", "update"):
        mine = ((columns["end"] - columns["start"])[columns["kind"] == Kind[kind.upper()]]).sum() * coarse.quantum_ns
        true = (truth["end_ns"] - truth["start_ns"])[truth["kind"] == kind].sum()
        assert mine == pytest.approx(true, rel=0.05)


# -- in the browser --------------------------------------------------------------------------------------------------
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
DRAWN = "document.getElementById('timeline').dataset.drawn"


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Page]:
    with Page(report) as opened:
        opened.until(DRAWN)
        yield opened


@pytest.fixture(autouse=True)
def whole_run_in_view(request: pytest.FixtureRequest) -> None:
    """Each test starts with the initial view of the timeline."""
    if "page" in request.fixturenames:
        opened: Page = request.getfixturevalue("page")
        reset(opened)


def reset(page: Page) -> None:
    page.run("(r => { [r.start, r.end] = r.bounds })(Bokeh.documents[0].roots()[0].x_range)")
    settle(page)


def settle(page: Page) -> None:
    """Wait until the change is drawn: two frames."""
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")


def state(page: Page) -> dict[str, str]:
    return dict(page.run("({...document.getElementById('timeline').dataset})"))


def in_view(page: Page) -> tuple[float, float]:
    start, end = page.run("(r => [r.start, r.end])(Bokeh.documents[0].roots()[0].x_range)")
    return start, end


def colours_in(page: Page) -> set[str]:
    """The kinds whose colour covers at least 30 pixels of the plot."""
    x, y, width, height = (int(n) for n in page.box("#timeline-plot"))
    pixels = page.picture()[y : y + height, x : x + width].reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    seen = {"#" + bytes(colour).hex().upper() for colour, count in zip(found, counts, strict=True) if count >= 30}
    return {kind for kind, colour in KIND_COLOURS.items() if colour.upper() in seen}


@needs_browser
def test_page_opens_without_errors_or_requests(page: Page) -> None:
    assert page.complaints == []
    assert page.requests == []


@needs_browser
def test_timeline_shows_every_kind_in_its_colour(page: Page) -> None:
    assert state(page)["visible"] == str(3 * 60 * 8)
    assert {"forward", "backward", "wait", "update"} <= colours_in(page)


@needs_browser
def test_wheel_zooms_in_until_single_spans_are_drawn(page: Page) -> None:
    assert state(page)["mode"] == "shares"
    before = in_view(page)
    x, y, width, _ = page.box("#timeline-plot")
    for _ in range(5):
        page.wheel(x + width / 2, y + 80, -400)
        settle(page)
    after = in_view(page)
    assert before[0] < after[0] < after[1] < before[1]
    assert state(page)["mode"] == "spans"
    assert 0 < int(state(page)["visible"]) < 60
    assert "drawn one by one" in page.run("document.getElementById('timeline-status').textContent")


@needs_browser
def test_dragging_moves_the_view(page: Page) -> None:
    x, y, width, _ = page.box("#timeline-plot")
    for _ in range(3):
        page.wheel(x + width / 2, y + 80, -400)
        settle(page)
    before = in_view(page)
    page.drag(x + width / 2, y + 80, x + width / 2 + 120, y + 80)
    settle(page)
    after = in_view(page)
    assert after[0] < before[0]
    assert after[1] - after[0] == pytest.approx(before[1] - before[0])


@needs_browser
def test_hovering_over_a_span_describes_it(page: Page, report: Path) -> None:
    spans = open_run(report.parent).spans(0)
    send = spans[(spans["kind"] == "send") & (spans["step"] == 30)].iloc[0]
    middle, length = (send["start_s"] + send["end_s"]) / 2, send["end_s"] - send["start_s"]
    move = "(r => { r.start = %.9f; r.end = %.9f })(Bokeh.documents[0].roots()[0].x_range)"
    page.run(move % (middle - length, middle + length))
    settle(page)
    point_at(page, 0.5, 0)
    shown = page.run("document.getElementById('timeline-tip').innerText").splitlines()
    assert shown[0] == "rank 0 on host0"
    kind, micros = re.fullmatch(r"(\w+): ([\d.]+) µs", shown[1]).groups()  # type: ignore[union-attr]
    assert kind == "send"
    assert float(micros) == pytest.approx(1e6 * length, abs=2.0)
    assert shown[2:5] == ["step 30", "with rank 1", "4,096 bytes"]


def point_at(page: Page, share: float, row: int) -> None:
    """Move the pointer over a row (0 is the top one), at a fraction of the plot's width."""
    frame = "(v => v.frame.bbox)([...Bokeh.index.roots][0])"
    x, y, _, _ = page.box("#timeline-plot")
    left, top, width = page.run(f"(b => [b.left, b.top, b.width])({frame})")
    page.move(x + left + share * width, y + top + 38 + 22 * row + 8)
    settle(page)


@needs_browser
def test_ranks_can_be_chosen(page: Page) -> None:
    choose = "(i => { i.value = %r; i.dispatchEvent(new Event('input')) })(document.getElementById('timeline-ranks'))"
    page.run(choose % "1")
    settle(page)
    assert state(page)["visible"] == str(60 * 8)
    page.run(choose % "")
    settle(page)
    assert state(page)["visible"] == str(3 * 60 * 8)


@needs_browser
def test_page_fits_a_phone(report: Path) -> None:
    with Page(report, width=390, height=800) as phone:
        phone.until(DRAWN)
        assert phone.run("document.documentElement.scrollWidth") <= 390
