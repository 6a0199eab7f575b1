"""Figures of hand-built runs: they are drawn and show what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hpctrain.analysis import Analysis
from hpctrain.trace import Run
from hpctrain.trace.schema import KINDS
from hpctrain.views.figures import FIGURES, NothingToShow
from hpctrain.views.figures.raster import kind_shares, paint
from hpctrain.views.figures.script import main
from tests.marks import slow
from tests.traces import HandMade

ROOT = Path(__file__).resolve().parents[2]
UNIT = re.compile(r"\((s|B|KiB|MiB|GiB|%|% of one core|MB/s|samples/s|updates|dimensionless)\)")
WITHOUT_UNIT = {"rank", "rank that waited", "rank waited for", "rank that sent", "to rank", "updates", "samples",
                "training loss", "accuracy", "loss (cross_entropy)"}  # fmt: skip



def busy(folder, size=4, steps=12, missing=()):
    """All-reduce with rank 2 twice as slow, then an asynchronous phase with the last rank as the server."""
    (folder / "metrics.csv").write_text(
        "step,samples,epoch,seconds,split,loss,metric\n"
        f"{steps},{steps * size * 32},1.0,0.3,validation,0.5,0.8\n{steps},{steps * size * 32},1.0,0.3,test,0.6,0.7\n"
    )
    nodes = [rank // max(1, size // 2) for rank in range(size)]
    with HandMade(folder, size, nodes=nodes, missing=missing) as run:
        ranks = [rank for rank in range(size) if rank not in missing]
        for rank in ranks:
            together(run[rank], rank, size, steps)
            begin = 25.0 * steps + 20.0
            server = rank == size - 1 and size > 1
            run[rank].phase(begin, 1, "server" if server else "worker", "parameter_server (async)")
            (serve if server else alone)(run[rank], rank, size, steps, begin)
            if rank == 0:
                link = '{"peer": 1, "same_node": true, "latency_s": 1e-5, "bytes_per_s": 1e9}'
                run[rank].event(begin + 26.0 * steps, "network", link)
                run[rank].event(begin + 26.0 * steps, "checkpoint", "000000012930.safetensors")
    return Analysis(Run(folder))


def together(rank, number, size, steps):
    """Rounds of 25 ms, then an evaluation of 10."""
    rank.phase(0.0, 0, "worker", "all_reduce")
    slow = 2.0 if number == 2 else 1.0
    for step in range(steps):
        t = 25.0 * step
        rank.span("data", t, t + 1.0, step)
        rank.span("forward", t + 1.0, t + 1.0 + 4.0 * slow, step)
        rank.span("backward", t + 1.0 + 4.0 * slow, t + 1.0 + 10.0 * slow, step)
        rank.span("reduce", t + 1.0 + 10.0 * slow, t + 23.0, step, bytes=100_000, id=step)
        rank.span("update", t + 23.0, t + 24.0, step)
        cursor = 32 * size * (step + 1)
        rank.log(t + 24.0, "loss of boxes", 1.0 / (step + 1 + number), step, cursor)
        rank.done(t + 25.0, step, loss=2.0 / (step + 1), cursor=cursor, staleness_min=0, staleness_max=0)
        if number == 0:
            fires = step == steps - 1
            sign = "<=" if fires else ">"
            rank.event(t + 25.0, "rule", f"loss_stable {0.5 / (step + 1):.4f} {sign} 0.01" + ", not armed" * (step < 3))
        if step % 4 == 0:
            rank.resource(t + 25.0 + 400.0 * step, 90.0, 2**28, 10**6 * step, 10**5 * step, 50.0, 2**30)
    rank.span("evaluate", 25.0 * steps, 25.0 * steps + 10.0)
    rank.event(25.0 * steps + 12.0, "switch", "loss_stable 0.0417 <= 0.01")


def alone(rank, number, size, steps, begin):
    server, workers = size - 1, max(1, size - 1)
    slow = 2.0 if number == 2 else 1.0
    for step in range(int(steps / slow)):
        t = begin + 25.0 * slow * step
        rank.span("forward", t, t + 8.0 * slow, step + steps)
        rank.span("backward", t + 8.0 * slow, t + 20.0 * slow, step + steps)
        if size > 1:
            rank.span("send", t + 20.0 * slow, t + 21.0 * slow, step + steps, bytes=10_000, peer=server, id=step)
            rank.span("recv", t + 22.0 * slow, t + 25.0 * slow, step + steps, bytes=10_000, peer=server, id=step + 1000)
            rank.span("send", t + 25.0 * slow, t + 25.0 * slow, step + steps, peer=server, id=step)
        rank.done(t + 25.0 * slow, step + steps, loss=0.2 + 0.01 * number, phase=1,
                  cursor=32 * (size * steps + workers * step + number + 1), staleness_min=0,
                  staleness_max=int(step > 0) * (int(3 * slow) + (step + number) % 2))  # fmt: skip


def serve(rank, number, size, steps, begin):
    """Every send begins while its worker waits for it: from 22 to 25 ms of a step."""
    sends = []
    for worker in range(size - 1):
        slow = 2.0 if worker == 2 else 1.0
        first = begin + 23.0 * slow + 0.02 * worker
        sends += [(first + 25.0 * slow * step, worker, step) for step in range(int(steps / slow))]
    for t, worker, step in sorted(sends):
        rank.span("send", t, t + 0.005, step, bytes=10_000, peer=worker, id=step + 1000)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return busy(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return busy(tmp_path_factory.mktemp("many"), 64)


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    return busy(tmp_path_factory.mktemp("incomplete"), missing=(1,))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return busy(tmp_path_factory.mktemp("single"), 1)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A rank without any span."""
    folder = tmp_path_factory.mktemp("bare")
    with HandMade(folder, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
    return Analysis(Run(folder))


@cache
def drawn(name: str, analysis: Analysis) -> Figure:
    """The figure, drawn and laid out; saved below $FIGURES, if that is set, for inspection."""
    figure = import_module(f"hpctrain.views.figures.{name}").draw(analysis)
    figure.draw_without_rendering()
    if "FIGURES" in os.environ:
        figure.savefig(Path(os.environ["FIGURES"]) / f"{analysis.run.folder.name}_{name}.png", dpi=80)
    return figure


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("run", ["four", slow("many")])
def test_every_axis_has_its_unit(name, run, request):
    figure = drawn(name, request.getfixturevalue(run))
    labels = [label for axes in panels(figure) for label in (axes.get_xlabel(), axes.get_ylabel())]
    assert any(labels)
    for label in filter(None, labels):
        assert UNIT.search(label) or label in WITHOUT_UNIT or label.startswith("rank waited for"), label
    for axes in panels(figure):
        column = [axes, *(other for other in panels(figure) if axes.get_shared_x_axes().joined(axes, other))]
        assert any(other.get_xlabel() for other in column)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("run", ["four", slow("many")])
def test_legends_cover_neither_data_nor_labels(name, run, request):
    figure = drawn(name, request.getfixturevalue(run))
    boxes = [part.get_window_extent() for axes in panels(figure) for part in (axes, axes.xaxis.label, axes.yaxis.label)]
    legends = [axes.get_legend() for axes in panels(figure) if axes.get_legend()] + figure.legends
    for legend in legends:
        covered = legend.get_window_extent()
        assert not any(box.width and box.shrunk(0.98, 0.98).overlaps(covered) for box in boxes)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_names_its_run_and_what_is_missing(name, incomplete):
    title = " ".join(drawn(name, incomplete).get_suptitle().split())
    assert incomplete.run.folder.name in title
    assert "note: rank 1 of 4: no trace file" in title


def test_timeline_has_a_row_per_rank_and_shows_which_rank_computes(four):
    axes = drawn("timeline", four).axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert rows == ["0 worker", "1 worker", "2 worker", "3 worker/server"]
    labels = [text.get_text() for text in drawn("timeline", four).legends[0].get_texts()]
    assert {"forward", "backward", "reduce", "evaluate", "switch (event)", "checkpoint (event)"} <= set(labels)
    assert axes.get_xlim()[1] == pytest.approx(0.632)


def test_shares_of_kinds_per_column_are_exact(tmp_path):
    with HandMade(tmp_path, 1) as made:
        made[0].span("forward", 0.0, 15.0)  # columns of 10 ms: all of the first, half of the second
        made[0].span("wait", 15.0, 17.0)
        made[0].span("wait", 18.0, 19.0)
        made[0].span("update", 20.0, 60.0, lane=1)
    run = Run(tmp_path)
    shares = kind_shares(run, run.start_ns, run.start_ns + 60_000_000, 6)
    assert shares[0, 0][KINDS.index("forward")].tolist() == pytest.approx([1.0, 0.5, 0, 0, 0, 0])
    assert shares[0, 0][KINDS.index("wait")].tolist() == pytest.approx([0, 0.3, 0, 0, 0, 0])
    assert shares[0, 1][KINDS.index("update")].tolist() == pytest.approx([0, 0, 1.0, 1.0, 1.0, 1.0])
    picture = paint(shares[0, 0], [KINDS.index("forward"), KINDS.index("wait")], 10)
    column = picture[:, 1].tolist()[::-1]
    assert column == [KINDS.index("forward")] * 5 + [KINDS.index("wait")] * 3 + [-1] * 2
    assert set(picture[:, 0]) == {KINDS.index("forward")}


def test_spans_much_shorter_than_a_column_keep_their_shares(tmp_path):
    with HandMade(tmp_path, 1) as made:
        for i in range(20_000):
            made[0].span("forward" if i % 2 else "wait", 0.01 * i, 0.01 * (i + 1))
    run = Run(tmp_path)
    (shares,) = kind_shares(run, run.start_ns, run.start_ns + 200_000_000, 100).values()
    assert np.allclose(shares.sum(axis=0), 1.0)
    assert np.allclose(shares[KINDS.index("forward")], 0.5)


def test_efficiency_has_a_bar_per_term_and_phase_and_a_row_per_rank(four):
    upper, lower = panels(drawn("efficiency", four))
    assert [len(bars) for bars in upper.containers] == [2, 2, 2]
    shown = [bar.get_width() / 100 for bars in upper.containers for bar in bars]
    terms = four.efficiency[["parallel_efficiency", "load_balance", "communication_efficiency"]]
    assert shown == pytest.approx(terms.to_numpy().T.ravel().tolist())
    assert [text.get_text() for text in lower.get_yticklabels()] == ["0", "1", "2", "3"]


def test_waiting_matrix_equals_the_analysis(four):
    left, right = panels(drawn("waiting", four))
    assert np.allclose(left.images[0].get_array(), four.waiting_matrix().to_numpy())
    assert right.get_yticklabels()[0].get_text() == "2"


def test_slow_rank_is_last_in_every_step(four):
    (axes,) = panels(drawn("critical_path", four))
    assert [bar.get_height() for bar in axes.containers[0]] == [0, 0, 100, 0]


def test_communication_shows_bytes_by_peer_and_those_of_collectives(four):
    left, right = panels(drawn("communication", four))
    cells = left.images[0].get_array().filled(0.0)
    assert cells.shape == (4, 5)
    assert cells[0, 4] / cells[0, 3] == pytest.approx(12 * 100_000 / (12 * 10_000))
    assert right.get_xscale() == right.get_yscale() == "log"
    near, far = right.lines
    assert (near.get_label(), far.get_label()) == ("achieved, same node", "measured, same node")
    sizes, rates = near.get_data()
    assert sizes.tolist() == pytest.approx([10_000] * 3)
    # 10 kB in 2, 1.98 and 3.96 ms
    assert rates.tolist() == pytest.approx([10 / 2, 10 / 1.98, 10 / 3.96], rel=0.01)
    assert far.get_ydata()[-1] == pytest.approx(1000.0, rel=0.01)


def test_loss_is_on_four_clocks_with_the_metric_below(four):
    figure = drawn("loss", four)
    assert [axes.get_xlabel() for axes in panels(figure)[4:]] == [
        "updates", "samples", "training time (s)", "bytes exchanged (MiB)",
    ]  # fmt: skip
    assert panels(figure)[4].get_ylabel() == "accuracy"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["training loss, running mean", "test", "validation"]


def test_loss_without_evaluations_has_four_panels(tmp_path):
    busy(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    assert len(panels(drawn("loss", Analysis(Run(tmp_path))))) == 4


def test_throughput_has_a_line_per_worker_or_per_outlier(four, many):
    few, crowd = (panels(drawn("throughput", analysis))[1].get_legend() for analysis in (four, many))
    assert [text.get_text() for text in few.get_texts()] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert len(crowd.get_texts()) == 4
    assert crowd.get_texts()[-1].get_text() == "the other 61"
    assert "rank 2" in [text.get_text() for text in crowd.get_texts()]


def test_staleness_histogram_adds_up_to_all_gradients(four):
    left, right = panels(drawn("staleness", four))
    assert sum(bar.get_height() for bars in left.containers for bar in bars) == pytest.approx(100.0)
    assert len(right.lines) == 3


def test_moment_of_the_switch_is_marked(four):
    upper, _ = panels(drawn("switching", four))
    star = next(line for line in upper.lines if line.get_marker() == "*")
    assert star.get_xdata().tolist() == [12 * 4 * 32]
    hollow = next(line for line in upper.lines if line.get_markerfacecolor() == "white")
    assert len(hollow.get_xdata()) == 3


def test_resources_have_a_panel_per_quantity_and_a_line_per_node(four):
    figure = drawn("resources", four)
    assert [axes.get_ylabel() for axes in panels(figure)] == [
        "CPU (% of one core)", "memory (GiB)", "network in (MB/s)", "network out (MB/s)", "GPU busy (%)",
        "GPU memory (GiB)",
    ]  # fmt: skip
    assert [text.get_text() for text in panels(figure)[0].get_legend().get_texts()] == ["node 0", "node 1"]
    assert len(panels(figure)[4].get_legend().get_texts()) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_run_with_nothing_to_show_is_one_message(name, bare):
    with pytest.raises(NothingToShow, match=r"^[a-z][^\n]{15,}$"):
        import_module(f"hpctrain.views.figures.{name}").draw(bare)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_run_of_one_rank_is_drawn_or_reported_as_empty(name, single):
    if name in ("waiting", "critical_path", "overlap"):
        with pytest.raises(NothingToShow):
            import_module(f"hpctrain.views.figures.{name}").draw(single)
    else:
        assert isinstance(drawn(name, single), Figure)


# -- programs ------------------------------------------------------------------------------------------------------
def test_every_figure_has_a_short_script():
    for name in FIGURES:
        link = ROOT / "analysis" / f"{name}.py"
        assert link.is_symlink()
        assert link.resolve() == ROOT / "hpctrain" / "views" / "figures" / f"{name}.py"
        text = link.read_text()
        assert len(text.splitlines()) <= 100
        assert f": python analysis/{name}.py RUN -o {name}.png\n\n" in text


@pytest.mark.slow
def test_script_draws_a_run_and_reports_a_wrong_folder(four, tmp_path):
    script, picture = ROOT / "analysis" / "loss.py", tmp_path / "x.png"
    good, bad = (
        subprocess.run([sys.executable, script, folder, "-o", picture], capture_output=True, text=True)
        for folder in (four.run.folder, tmp_path)
    )
    assert good.returncode == 0, good.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    assert "not a run folder" in bad.stderr


@pytest.mark.parametrize(
    ("figure", "output", "expected"),
    [
        ("loss", "x.txt", "must be a .png, .pdf or .svg file"),
        ("loss", "nowhere/x.png", "cannot be written (No such file or directory)"),
        ("staleness", "x.png", "no phase is asynchronous"),
    ],
)
def test_undrawable_run_is_one_message_and_status_2(figure, output, expected, tmp_path, capsys):
    with HandMade(tmp_path, 1) as run:
        together(run[0], 0, 1, 3)
    with pytest.raises(SystemExit) as ended:
        main(import_module(f"hpctrain.views.figures.{figure}").draw, [str(tmp_path), "-o", str(tmp_path / output)])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert len(printed.splitlines()) == 1


def test_figures_leave_no_matplotlib_state():
    folder = ROOT / "hpctrain" / "views" / "figures"
    modules = [folder / f"{name}.py" for name in (*FIGURES, "style", "raster", "script")]
    assert not any("pyplot" in module.read_text() for module in modules)
