"""Traces of rows, as OpenTelemetry's exporters get them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ltx_ray.driver import row_traces
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.row_traces import RowTraces, check_traces
from ltx_ray.storage.store import Store
from tests.support.simulated_runs import rows, run

BAD = {"id": "bad", "prompt": "a [[stage2:error]]"}


def traced(tmp_path, manifest):
    """The spans of a simulated run of the rows, by trace, and what has made them."""
    driver, _ = run(tmp_path, manifest)
    exporter = InMemorySpanExporter()
    traces = RowTraces("r1", print, exporter)
    driver.events._traces = traces
    driver.run(driver.tracker.plan.open())
    driver.events.flush()
    traces._sender.force_flush()
    spans = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(f"{span.context.trace_id:032x}", []).append(span)
    return spans, traces


def test_a_row_is_a_trace_by_its_item_id_with_a_span_for_each_call(tmp_path):
    twin = {**rows(1)[0], "id": "twin"}
    spans, traces = traced(tmp_path, [*rows(2), twin, BAD])
    assert len(spans) == 3, "rows that share a clip share its trace"
    by_id = {}
    for item, found in spans.items():
        (root,) = [span for span in found if span.parent is None]
        assert root.name == "row" and root.attributes["ltx_ray.item_id"] == item
        assert all(s.parent.span_id == root.context.span_id for s in found if s is not root)
        assert root.start_time == min(s.start_time for s in found)
        assert root.end_time >= max(s.end_time for s in found)
        assert root.resource.attributes["ltx_ray.run"] == "r1"
        by_id[root.attributes["ltx_ray.id"]] = (
            root,
            sorted((s for s in found if s is not root), key=lambda s: s.start_time),
        )
    root, calls = by_id["r0"]
    assert sorted(s.name for s in calls) == ["decode", "stage1", "stage2", "text"] and root.status.is_unset
    assert {s.attributes["ltx_ray.pool"] for s in calls} == {"text", "stage1", "stage2", "decode"}
    root, calls = by_id["bad"]
    assert not root.status.is_ok and "by chance" in root.status.description
    assert [s.status.is_ok or s.status.is_unset for s in calls if s.name == "stage2"] == [False] * 3
    assert not traces._calls, "nothing is kept of rows that have ended"


def test_a_missing_package_is_named_before_anything_else(monkeypatch):
    monkeypatch.setattr(row_traces, "_EXPORTER", "no_such_package.exporter")
    with pytest.raises(ValueError, match=r"^--trace: needs .*; legal: after pip install 'ltx-ray\[otel\]'$"):
        check_traces()


def test_a_run_without_traces_imports_nothing_of_theirs(tmp_path):
    code = "import sys, ltx_ray.cli.app; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert EventLog(Store(str(tmp_path)), "r1")._traces is None


def test_a_collector_that_does_not_answer_is_said_once_and_without_a_traceback(tmp_path, caplog):
    class Broken(InMemorySpanExporter):
        def export(self, spans):
            raise ConnectionError("nobody is there")

    said = []
    traces = RowTraces("r1", said.append, Broken())
    for item in ("a" * 32, "b" * 32):
        call = {"event": "call", "item_id": item, "stage": "text", "replica": "t", "role": "text", "start": 1.0}
        traces.take({**call, "seconds": 1.0, "ok": True})
        traces.take({"event": "item_finished", "item_id": item, "id": "r", "t": 3.0})
        traces._sender.force_flush()
    assert said == ["--trace: spans could not be sent (nobody is there); the run goes on without them"]
    assert not caplog.records
