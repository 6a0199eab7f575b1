"""The export: read back and checked against the trace-event format and against runs built by hand."""

import csv
import gzip
import io
import json
import sys
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from hpctrain.errors import HpctrainError
from hpctrain.trace import Run, open_run
from hpctrain.views import export, progress
from hpctrain.views.export import export_run, messages, parse_ranks, parse_steps
from hpctrain.views.export.messages import Ids
from hpctrain.views.export.traceformat import microseconds
from tests.traces import HandMade

REQUIRED = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "s": {"name", "cat", "ts", "id", "pid", "tid"},
    "f": {"name", "cat", "ts", "id", "pid", "tid", "bp"},
    "i": {"name", "ts", "pid", "tid", "s"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "tid", "args"},
}


class Timeline:
    """A timeline read back as Perfetto does it: in time order, with a stack of open spans per thread.

    `flows`: (sending span, receiving span) of every message; `lost`: flows that end before they begin, which Perfetto
    drops.
    """

    def __init__(self, path):
        open_any = gzip.open if path.suffix == ".gz" else open
        with open_any(path, "rt", encoding="utf-8") as file:
            self.whole = json.load(file)
        self.events = self.whole["traceEvents"]
        self.facts = self.whole["otherData"]
        self._check_events()
        self.lost: list[int] = []
        self.flows = self._bind_flows()

    def _check_events(self):
        for event in self.events:
            assert event["ph"] in REQUIRED, event
            assert REQUIRED[event["ph"]] <= event.keys(), event
            assert event.get("ts", 0) >= 0, event
            assert event.get("dur", 0) >= 0, event
            assert event["ph"] != "C" or all(isinstance(value, float) for value in event["args"].values()), event
        named = {(e["name"], e["pid"], e["tid"]) for e in self.of("M")}
        for event in self.events:
            if event["ph"] != "M":
                assert ("process_name", event["pid"], 0) in named, event
                assert ("thread_name", event["pid"], event["tid"]) in named, event
                assert event["tid"] > 0

    def _bind_flows(self):
        open_spans: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
        begun, flows = {}, {}
        timed = [event for event in self.events if event["ph"] in "Xsf"]
        for event in sorted(timed, key=lambda event: int(event["ts"] * 1000)):  # truncated, as in older readers
            stack = open_spans[event["pid"], event["tid"]]
            if event["ph"] == "X":
                begin = int(event["ts"] * 1000)
                end = begin + int(event["dur"] * 1000)
                while stack and stack[-1][1] <= begin:
                    stack.pop()
                assert not stack, f"{event} overlaps {stack[-1]}"
                stack.append((event, end))
            elif event["ph"] == "s":
                assert event["id"] not in begun
                begun[event["id"]] = stack[-1][0]
            else:
                assert event["bp"] == "e"
                assert event["id"] not in flows
                if event["id"] not in begun:
                    self.lost.append(event["id"])
                    continue
                flows[event["id"]] = begun[event["id"]], stack[-1][0]
        assert sorted([*flows, *self.lost]) == sorted(begun)
        for sending, receiving in flows.values():
            assert (sending["name"], receiving["name"]) == ("send", "recv")
            assert sending["args"]["id"] == receiving["args"]["id"]
        return [flows[id] for id in sorted(flows)]

    def of(self, phase, name=None):
        return [e for e in self.events if e["ph"] == phase and name in (None, e["name"])]

    def thread(self, event):
        return self._name("thread_name", event["pid"], event["tid"])

    def process(self, event):
        return self._name("process_name", event["pid"], 0)

    def _name(self, kind, pid, tid):
        (name,) = [e["args"]["name"] for e in self.of("M", kind) if (e["pid"], e["tid"]) == (pid, tid)]
        return name


def timeline(run, **selected):
    shown = Timeline(export_run(run, "perfetto", run / "timeline.json", out=io.StringIO(), **selected))
    assert not shown.lost
    return shown


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def exchange(tmp_path):
    """Two nodes; rank 0 sends to rank 1, whose clock is 7 ms behind, and rank 1 answers. Two steps."""
    with HandMade(tmp_path, 2, nodes=[0, 1], offsets=[0.0, 7.0]) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
        for step in (0, 1):
            at = 10.0 * step
            run[0].span("forward", at, at + 2, step)
            run[0].span("send", at + 2, at + 2.5, step, 1000, 1, 100 + step)
            run[0].span("send", at + 2.5, at + 3, step, 0, 1, 100 + step)  # waits until it is received
            run[0].span("recv", at + 4, at + 8, step, 500, 1, 200 + step)
            run[0].done(at + 9, step)
            run[1].span("recv", at + 1, at + 3.5, step, 1000, 0, 100 + step)
            run[1].span("update", at + 3.5, at + 5, step)
            run[1].span("send", at + 5, at + 6, step, 500, 0, 200 + step)
            run[1].done(at + 6.5, step)
    return tmp_path


# -- timeline ------------------------------------------------------------------------------------------------
def test_spans_are_in_microseconds_of_the_run_clock(exchange):
    shown = [(e["name"], e["ts"], e["dur"]) for e in timeline(exchange).of("X", "update")]
    assert shown == [("update", 3500.0, 1500.0), ("update", 13500.0, 1500.0)]


def test_message_is_a_flow_from_its_send_to_its_receive_span(exchange):
    shown = timeline(exchange)
    flows = [(shown.thread(a), a["ts"], shown.thread(b), b["ts"], a["args"]["bytes"]) for a, b in shown.flows]
    first, second = "rank 0 (worker)", "rank 1 (worker)"
    assert flows == [
        (first, 2000.0, second, 1000.0, 1000),
        (first, 12000.0, second, 11000.0, 1000),
        (second, 5000.0, first, 4000.0, 500),
        (second, 15000.0, first, 14000.0, 500),
    ]
    assert shown.facts["messages"] == 4


def test_flows_begin_and_end_inside_their_spans(exchange):
    shown = timeline(exchange)
    for flow in shown.of("s") + shown.of("f"):
        around = [e for e in shown.of("X") if e["tid"] == flow["tid"] and e["ts"] <= flow["ts"] < e["ts"] + e["dur"]]
        assert [e["name"] for e in around] == ["send" if flow["ph"] == "s" else "recv"]


def test_message_received_without_waiting_ends_in_an_empty_span(tmp_path):
    with HandMade(tmp_path, 2) as run:
        run[0].span("send", 1.0, 2.0, bytes=8, peer=1, id=5)
        run[1].span("forward", 0.0, 4.0)
        run[1].span("recv", 4.0, 4.0, bytes=8, peer=0, id=5)
        run[1].span("backward", 4.0, 6.0)
    ((_, receiving),) = timeline(tmp_path).flows
    assert (receiving["ts"], receiving["dur"]) == (4000.0, 0.0)


def test_message_with_an_untraced_end_is_no_flow(tmp_path):
    with HandMade(tmp_path, 3, missing=(2,)) as run:
        run[0].span("send", 1.0, 2.0, bytes=8, peer=2, id=1)  # rank 2 has no file
        run[0].span("send", 2.0, 3.0, bytes=8, peer=1, id=1)
        run[0].span("send", 3.0, 4.0, bytes=8, peer=1, id=2)  # never received
        run[1].span("recv", 2.0, 5.0, bytes=8, peer=0, id=1)
        run[1].span("recv", 5.0, 6.0, bytes=8, peer=0, id=7)  # never sent
        run[1].span("recv", 6.0, 7.0, bytes=8, peer=-1, id=3)  # of a broadcast
    assert [sending["ts"] for sending, _ in timeline(tmp_path).flows] == [1000.0]


def test_ambiguous_ids_are_no_flows(tmp_path):
    with HandMade(tmp_path, 2) as run:
        run[0].span("send", 1.0, 2.0, bytes=8, peer=1, id=4)
        run[0].span("send", 2.0, 3.0, bytes=8, peer=1, id=4)
        run[0].span("send", 3.0, 4.0, bytes=8, peer=1, id=-1)
        run[1].span("recv", 1.0, 3.0, bytes=8, peer=0, id=4)
        run[1].span("recv", 4.0, 5.0, bytes=8, peer=0, id=-1)
    assert timeline(tmp_path).flows == []


def test_messages_before_and_after_resuming_are_kept_apart(tmp_path):
    for attempt in (1, 2):
        with HandMade(tmp_path, 2, attempt=attempt) as run:
            at = 100.0 * attempt
            run[0].span("send", at, at + 1, bytes=attempt, peer=1, id=1)
            run[1].span("recv", at, at + 2, bytes=attempt, peer=0, id=1)
    shown = timeline(tmp_path)
    assert [(a["args"]["bytes"], b["args"]["bytes"]) for a, b in shown.flows] == [(1, 1), (2, 2)]
    assert shown.facts["attempts"] == 2


def test_ranks_are_grouped_by_node(tmp_path):
    with HandMade(tmp_path, 4, nodes=[0, 1, 0, 1], roles=["worker", "worker", "worker", "server"]) as run:
        for rank in range(4):
            run[rank].span("data", 0.0, 1.0)
    shown = timeline(tmp_path)
    assert {(shown.process(e), shown.thread(e)) for e in shown.of("X")} == {
        ("node 0 (host0)", "rank 0 (worker)"),
        ("node 0 (host0)", "rank 2 (worker)"),
        ("node 1 (host1)", "rank 1 (worker)"),
        ("node 1 (host1)", "rank 3 (server)"),
    }
    places = {shown.process(e): e["args"]["sort_index"] for e in shown.of("M", "process_sort_index")}
    assert sorted(places, key=lambda name: places[name]) == ["run", "node 0 (host0)", "node 1 (host1)"]
    threads = {shown.thread(e): e["args"]["sort_index"] for e in shown.of("M", "thread_sort_index") if e["pid"] == 1}
    assert sorted(threads, key=lambda name: threads[name]) == ["rank 1 (worker)", "rank 3 (server)"]


def test_colocated_server_has_its_own_thread(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].span("forward", 0.0, 6.0)
        run[0].span("send", 6.0, 7.0, bytes=8, peer=0, id=1)
        run[0].span("recv", 2.0, 6.5, bytes=8, peer=0, id=1, lane=1)
    shown = timeline(tmp_path)
    assert {e["name"]: shown.thread(e) for e in shown.of("X")} == {
        "forward": "rank 0 (worker)",
        "send": "rank 0 (worker)",
        "recv": "rank 0 server thread",
    }
    ((sending, receiving),) = shown.flows
    assert (shown.thread(sending), shown.thread(receiving)) == ("rank 0 (worker)", "rank 0 server thread")


def test_phases_and_changes_of_role_are_shown(tmp_path):
    with HandMade(tmp_path, 2, roles=["worker", "server"]) as run:
        for rank, role in ((0, "worker"), (1, "server")):
            run[rank].phase(1.0 + rank, 0, role, "parameter_server (async)")
            run[rank].phase(20.0 + rank, 1, "worker", "all_reduce")
            for at in (0.0, 5.0, 25.0):
                run[rank].span("update", at, at + 1)
    shown = timeline(tmp_path)
    updates = [e for e in shown.of("X", "update") if e["tid"] == 1001]
    assert [e["args"].get("phase") for e in updates] == [None, 0, 1]
    assert shown.thread(updates[0]) == "rank 1 (server, then worker)"
    phases = [(e["name"], e["ts"], e["dur"], shown.process(e)) for e in shown.of("X") if e["cat"] == "phase"]
    assert phases == [
        ("phase 0: parameter_server (async)", 1000.0, 19000.0, "run"),
        ("phase 1: all_reduce", 20000.0, 6000.0, "run"),
    ]


def test_event_of_all_ranks_is_global_and_of_one_rank_local(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("forward", 0.0, 1.0)
            run[rank].event(2.0 + rank, "switch", 'loss above "1.5"')
        run[1].event(4.0, "resources", "sampling stopped")
        run[0].event(5.0, "checkpoint", "000000000064.safetensors")
    shown = timeline(tmp_path)
    assert [(e["name"], e["ts"], e["s"], shown.thread(e)) for e in shown.of("i")] == [
        ('switch: loss above "1.5"', 2000.0, "g", "phases"),
        ("resources: sampling stopped", 4000.0, "t", "rank 1 (worker)"),
        ("checkpoint: 000000000064.safetensors", 5000.0, "g", "phases"),
    ]


def test_resources_become_counters_over_their_interval(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("forward", 0.0, 4000.0)
            run[rank].resource(1000.0, 10.0, 1 << 20, 0, 0, -1.0, -1)
            run[rank].resource(2000.0, 50.0, 3 << 20, 5_000_000, 1_000_000, -1.0, -1)
            run[rank].resource(2001.0, 0.0, 3 << 20, 5_000_000, 1_000_000, -1.0, -1)  # too soon for a mean
    shown = timeline(tmp_path).of("C")
    counters = {(e["name"], e["ts"] / 1e6): e["args"] for e in shown}
    assert counters["rank 1 CPU", 1.0] == {"%": 50.0}
    assert counters["rank 1 memory", 2.0] == {"MiB": 3.0}
    assert counters["network in", 1.0] == {"MB/s": 5.0}
    assert counters["network out", 1.0] == {"MB/s": 1.0}
    count = Counter(e["name"] for e in shown)
    each = {"rank 0 CPU": 1, "rank 1 CPU": 1, "rank 0 memory": 3, "rank 1 memory": 3}
    assert count == {**each, "network in": 1, "network out": 1}  # no GPU, and the network once per node


def test_spans_carry_their_attributes(exchange):
    (span,) = [e for e in timeline(exchange).of("X", "send") if e["ts"] == 12000.0]
    assert span["args"] == {"phase": 0, "step": 1, "bytes": 1000, "peer": 1, "id": "101"}
    assert span["cat"] == "communication"


def test_nanoseconds_survive_readers_that_truncate(tmp_path):
    ns = np.concatenate([np.arange(5000), 10**15 + np.arange(5000)])
    assert (microseconds(ns) * 1000).astype(np.int64).tolist() == ns.tolist()
    assert np.rint(microseconds(ns) * 1000).astype(np.int64).tolist() == ns.tolist()


def test_missing_rank_is_noted(tmp_path):
    with HandMade(tmp_path, 2, missing=(1,)) as run:
        run[0].span("forward", 0.0, 1.0)
    out = io.StringIO()
    shown = Timeline(export_run(tmp_path, "perfetto", out=out))
    assert shown.facts["notes"] == ["rank 1 of 2: no trace file"]
    assert out.getvalue() == "note: rank 1 of 2: no trace file\n"
    assert [e["name"] for e in shown.of("i")] == ["note: rank 1 of 2: no trace file"]


def test_damaged_rank_is_noted_and_the_rest_exported(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("forward", 0.0, 1.0)
    (tmp_path / "trace" / "rank_00001.h5").write_bytes(b"nothing of the kind")
    shown = timeline(tmp_path)
    assert "rank 1: trace/rank_00001.h5 cannot be read" in shown.facts["notes"][0]
    assert [shown.thread(e) for e in shown.of("X")] == ["rank 0 (worker)"]


def test_timeline_contains_facts_of_the_run(exchange):
    facts = timeline(exchange).facts
    assert facts["selected"] == "ranks 0-1 of 2"
    assert 'model = "mlp"' in facts["job"]


def test_unknown_keys_for_perfetto_follow_the_events(exchange):
    assert list(timeline(exchange).whole) == ["traceEvents", "displayTimeUnit", "otherData"]


# -- selection -----------------------------------------------------------------------------------------------
def test_only_messages_among_selected_ranks_are_shown(exchange):
    shown = timeline(exchange, ranks=[0])
    assert {shown.thread(e) for e in shown.of("X") if e["cat"] != "phase"} == {"rank 0 (worker)"}
    assert shown.flows == []
    assert shown.facts["selected"] == "rank 0 of 2"


def test_selected_steps_limit_the_time_range(exchange):
    shown = timeline(exchange, steps=range(1, 2))
    spans = [e for e in shown.of("X") if e["cat"] != "phase"]
    assert [(e["name"], e["ts"]) for e in spans if e["args"]["step"] != 1] == [("recv", 4000.0)]  # on rank 0, meanwhile
    assert len(spans) == 8
    assert [sending["args"]["step"] for sending, _ in shown.flows] == [1, 1]
    (phase,) = [e for e in shown.of("X") if e["cat"] == "phase"]
    assert (phase["ts"], phase["ts"] + phase["dur"]) == (6500.0, 18000.0)  # rank 1 was done first; the last span
    assert shown.of("i") == []  # the roles were set long before


def test_server_spans_are_selected_by_time_not_by_its_own_steps(tmp_path):
    with HandMade(tmp_path, 2, roles=["worker", "server"]) as run:
        for step in (0, 1, 2):
            run[0].span("forward", 10.0 * step, 10.0 * step + 5, step)
            run[0].done(10.0 * step + 9, step)
            run[1].span("update", 10.0 * step + 6, 10.0 * step + 7, step + 1)
    shown = timeline(tmp_path, steps=range(1, 2))
    assert sorted((e["name"], e["ts"]) for e in shown.of("X")) == [("forward", 10000.0), ("update", 16000.0)]


def test_selection_applies_to_tables_too(exchange):
    folder = export_run(exchange, "csv", ranks=[1], steps=range(1, 2))
    assert {(row["rank"], row["step"]) for row in rows(folder / "spans.csv")} == {("1", "1")}
    assert [row["step"] for row in rows(folder / "steps.csv")] == ["1"]
    assert rows(folder / "events.csv") == []


def test_ranges_of_ranks_and_steps_are_parsed():
    assert parse_ranks("0,3, 8-10") == [0, 3, 8, 9, 10]
    assert parse_steps("100:110") == range(100, 111)
    assert parse_steps("7") == range(7, 8)
    assert 10**9 in parse_steps("5:") and 4 not in parse_steps("5:")
    assert parse_steps(":3") == range(4)


@pytest.mark.parametrize("text", ["", "1-", "a", "3-1", "1,,2", "-1"])
def test_malformed_ranks_are_refused(text):
    with pytest.raises(HpctrainError, match="write ranks such as"):
        parse_ranks(text)


@pytest.mark.parametrize("text", ["", ":", "a", "3:1", "1:2:3", "-1"])
def test_malformed_steps_are_refused(text):
    with pytest.raises(HpctrainError, match="the first step and the last"):
        parse_steps(text)


def test_steps_outside_the_run_are_refused(exchange):
    with pytest.raises(HpctrainError, match="any of the steps 5 to 6; the run has steps 0 to 1"):
        export_run(exchange, "csv", steps=range(5, 7))


def test_unknown_rank_is_refused(exchange):
    with pytest.raises(HpctrainError, match="no readable trace of rank 2; choose from ranks 0-1"):
        export_run(exchange, "perfetto", ranks=[0, 2])


# -- tables --------------------------------------------------------------------------------------------------
def test_tables_equal_the_frames_of_the_run(exchange):
    folder = export_run(exchange, "csv")
    run = open_run(exchange)
    for table, frame in (("spans", run.spans()), ("steps", run.steps()), ("resources", run.resources())):
        written = rows(folder / f"{table}.csv")
        assert len(written) == len(frame)
        with open(folder / f"{table}.csv") as file:
            assert file.readline().strip().split(",") == list(frame.columns)
    for written, known in zip(rows(folder / "spans.csv"), run.spans().to_dict("records"), strict=True):
        assert written == {name: str(value) for name, value in known.items()}
    assert [row["text"] for row in rows(folder / "events.csv")] == ["phase 0: worker of all_reduce"] * 2


def test_tables_do_not_depend_on_the_block_size(exchange, monkeypatch):
    whole = export_run(exchange, "csv", exchange / "whole")
    original = Run.blocks
    monkeypatch.setattr(Run, "blocks", lambda run, *args, **named: original(run, *args, **{"rows": 2, **named}))
    parts = export_run(exchange, "csv", exchange / "parts")
    for table in ("spans", "steps", "events"):
        assert (parts / f"{table}.csv").read_bytes() == (whole / f"{table}.csv").read_bytes()
    assert len(timeline(exchange).flows) == 4


def test_evaluations_are_exported_with_the_other_tables(exchange):
    (exchange / "metrics.csv").write_text("step,samples,loss\n1,64,2.5\n2,128,2.0\n")
    folder = export_run(exchange, "csv")
    assert [row["loss"] for row in rows(folder / "metrics.csv")] == ["2.5", "2.0"]
    export_run(exchange, "csv", folder, steps=range(1, 2))
    assert [row["loss"] for row in rows(folder / "metrics.csv")] == ["2.0"]


def test_parquet_tables_equal_the_frames_of_the_run(exchange):
    import pandas as pd

    folder = export_run(exchange, "parquet")
    run = open_run(exchange)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "spans.parquet"), run.spans(), check_categorical=False)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "steps.parquet"), run.steps(), check_categorical=False)
    assert pd.read_parquet(folder / "events.parquet")["text"].tolist() == ["phase 0: worker of all_reduce"] * 2
    assert pd.read_parquet(folder / "resources.parquet").columns.tolist() == run.resources().columns.tolist()


def test_parquet_without_pyarrow_says_what_to_install(exchange, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(HpctrainError, match=r"needs pyarrow.*pip install 'hpctrain\[parquet\]'"):
        export_run(exchange, "parquet")
    assert not (exchange / "parquet").exists()


# -- outputs -------------------------------------------------------------------------------------------------
def test_timeline_is_compressed_if_its_name_ends_in_gz(exchange):
    path = export_run(exchange, "perfetto")
    assert path == exchange / "perfetto.json.gz"
    assert Timeline(path).events == timeline(exchange).events


def test_timeline_too_large_for_a_browser_is_reported(exchange, monkeypatch):
    monkeypatch.setitem(export.LARGE_BYTES, ".gz", 100)
    out = io.StringIO()
    export_run(exchange, "perfetto", out=out)
    assert "--ranks and --steps export a part" in out.getvalue()


def test_unknown_format_is_refused(exchange):
    with pytest.raises(HpctrainError, match="--format otf2: no such format; choose perfetto, csv, parquet"):
        export_run(exchange, "otf2")


def test_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(HpctrainError, match="not a run folder"):
        export_run(tmp_path, "perfetto")


@pytest.mark.parametrize("format", ["perfetto", "csv"])
def test_unwritable_output_is_reported(exchange, format):
    (exchange / "file").write_text("")
    with pytest.raises(HpctrainError, match="cannot be written .*; choose another place with -o"):
        export_run(exchange, format, exchange / "file" / "out")


def test_output_that_is_a_folder_is_refused(exchange):
    with pytest.raises(HpctrainError, match="this is a folder; give the name of a file"):
        export_run(exchange, "perfetto", exchange / "trace")


def test_failed_export_keeps_the_previous_file(exchange, monkeypatch):
    path = export_run(exchange, "perfetto")
    before = path.read_bytes()
    monkeypatch.setattr(messages.Messages, "number", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(exchange, "perfetto")
    assert path.read_bytes() == before
    assert not list(exchange.glob(".*.part"))


def test_progress_is_shown_only_for_long_exports(exchange, monkeypatch):
    out = io.StringIO()
    export_run(exchange, "perfetto", out=out)
    assert out.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    export_run(exchange, "perfetto", out=out)
    assert "spans: 57 % of 14" in out.getvalue()


# -- ids -----------------------------------------------------------------------------------------------------
def test_ids_keep_their_positions():
    ids = np.array([3, 4, 5, 9, 20, 21])
    kept = Ids(ids)
    assert kept.all().tolist() == ids.tolist()
    assert kept.place(np.array([21, 3, 6, 0, 9, 22, 5])).tolist() == [5, 0, -1, -1, 3, -1, 2]
    assert len(kept.first) == 3  # three runs
    assert Ids(ids[:0]).all().tolist() == []
    assert Ids(ids[:0]).place(ids).tolist() == [-1] * 6
