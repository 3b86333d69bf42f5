"""What status and the report are told of a run: from its summary, or from the events of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ltx_ray.dataset import layout
from ltx_ray.dataset.report import write_report
from ltx_ray.dataset.run_summary import LastCall, SummaryBuilder, parked_lines, read_run, wait_lines
from ltx_ray.dataset.timeline import build_timeline
from ltx_ray.records import plain
from ltx_ray.storage.store import Store
from tests.support import report_data as data

CALL = {"t": 110.0, "event": "call", "role": "stage1", "replica": "stage1-0", "stage": "stage1", "id": "cat",
        "start": 100.0, "seconds": 10.0, "ok": True}  # fmt: skip


def builder(*events: dict) -> SummaryBuilder:
    made = SummaryBuilder()
    for event in events:
        made.add(event)
    return made


def write_records(store: Store, events: list[dict], at: float = 0.0, rate: float | None = None, **record) -> dict:
    """run.json with a summary of `events`, and their timeline. The events themselves are not there."""
    made = builder(*events)
    record = {"run_id": "r1", "state": "running", **record, "summary": plain(made.summary(at, rate))}
    store.write_bytes("run.json", json.dumps(record).encode())
    if (timeline := made.timeline()) is not None:
        store.write_bytes(layout.timeline_path("r1"), timeline.json().encode())
    return record


def test_a_summary_counts_and_knows_the_last_call_of_each_replica_that_lives():
    lost = {"t": 120.0, "event": "gang_lost", "role": "stage1", "replica": "stage1-1", "reason": "x"}
    made = builder(
        {**CALL, "id": "older"}, CALL, {**CALL, "replica": "stage1-1"}, lost, {**CALL, "replica": "stage1-2"},
        {**lost, "event": "gang_given_back", "replica": "stage1-2"}, {"t": 130.0, "event": "item_finished"},
    )  # fmt: skip
    summary = made.summary(140.0, 72.0)
    assert summary.replicas == {"stage1-0": LastCall("stage1", "cat", 10.0, 110.0)}
    assert summary.events == {"call": 4, "gang_lost": 1, "gang_given_back": 1, "item_finished": 1}
    assert (summary.at, summary.clips_per_hour, made.last) == (140.0, 72.0, 130.0)


def test_what_stages_wait_for_and_cards_that_are_left_alone_are_told(tmp_path):
    waits = {"stage2": {"decode": 0.63, "rows": 0.05}, "decode": {"stage2": 0.9}}
    events = [
        {"t": 1.0, "event": "waits", "shares": {"stage2": {"decode": 0.1}}},
        {"t": 2.0, "event": "waits", "shares": {**waits, "broken": 3}},
        {"t": 3.0, "event": "card_parked", "replica": "stage1-4", "where": "node 10.0.0.7, GPU 3"},
        {"t": 4.0, "event": "card_parked", "replica": "stage1-5", "where": "node 10.0.0.8, GPU 0"},
        {"t": 5.0, "event": "card_retried", "replica": "stage1-5"},
        {"t": 6.0, "event": "node_excluded", "node": "a1", "where": "node 10.0.0.8", "reason": "it is odd"},
        {"t": 6.0, "event": "node_excluded", "node": "b2", "where": "node 10.0.0.9", "reason": "its only GPU failed"},
        {"t": 7.0, "event": "node_retried", "node": "a1"},
        {"t": 8.0, "event": "driver_differs", "node": "c3", "where": "node 10.0.0.6", "driver": "550.54"},
    ]
    run = read_run(Store(str(tmp_path)), write_records(Store(str(tmp_path)), events), now=9.0)
    assert run.waits == waits
    assert wait_lines(run.waits) == ["stage2 waits for decode 63% of the time"], "an idle decoder costs no GPU"
    assert parked_lines(run.parked) == ["node 10.0.0.7, GPU 3: left alone, because replicas failed there"]
    assert run.odd_nodes == [
        "node 10.0.0.9: excluded, because its only GPU failed",
        "node 10.0.0.7, GPU 3: left alone, because replicas failed there",
        "node 10.0.0.6: its NVIDIA driver is 550.54",
    ]


def test_the_summary_takes_the_place_of_the_events(tmp_path):
    store = Store(str(tmp_path))
    record = write_records(store, [CALL], at=200.0, rate=72.0)
    store.write_bytes("events.jsonl", json.dumps({**CALL, "replica": "of another time"}).encode())
    run = read_run(store, record, now=500.0)
    assert (run.clips_per_hour, run.last) == (72.0, 200.0)
    assert run.replicas == {"stage1-0": LastCall("stage1", "cat", 10.0, 110.0)}
    assert run.timeline == build_timeline([CALL])


def test_after_the_end_the_rate_is_that_of_the_record(tmp_path):
    store = Store(str(tmp_path))
    record = write_records(store, [CALL], rate=72.0, state="finished", clips_per_hour=982.4)
    assert read_run(store, record, now=None).clips_per_hour == 982.4


def test_an_earlier_version_wrote_events_alone(tmp_path):
    store = Store(str(tmp_path))
    finished = {"t": 150.0, "event": "item_finished", "item_id": "a"}
    older = {**CALL, "replica": "of the run before"}
    text = "".join(json.dumps(event) + "\n" for event in (older, {"t": 99.0, "event": "run_started"}, CALL, finished))
    store.write_bytes("events.jsonl", text.encode() + b'[]\n{"t": 1, "ev')
    notes: list[str] = []
    run = read_run(store, {"state": "running"}, now=200.0, note=notes.append)
    assert run.clips_per_hour == 36 and run.last == 150.0
    assert set(run.replicas) == {"stage1-0"} and notes == ["events.jsonl: 2 malformed lines skipped"]
    assert [lane.replica for lane in run.timeline.roles[0].lanes] == ["stage1-0"]
    assert read_run(store, {"state": "finished", "clips_per_hour": 5.0}, now=None).timeline == run.timeline


@pytest.mark.parametrize("summary", [3, {}, {"at": float("nan")}, {"at": 1.0, "clips_per_hour": None, "events": {},
                                     "replicas": {"a": 1}}])  # fmt: skip
def test_a_damaged_summary_is_none(tmp_path, summary):
    run = read_run(Store(str(tmp_path)), {"run_id": "r1", "summary": summary}, now=None)
    assert (run.clips_per_hour, run.last, run.timeline, dict(run.replicas)) == (None, None, None, {})


def test_a_damaged_timeline_is_noted(tmp_path):
    store = Store(str(tmp_path))
    record = write_records(store, [CALL])
    store.write_bytes(layout.timeline_path("r1"), b"{")
    notes: list[str] = []
    assert read_run(store, record, now=None, note=notes.append).timeline is None
    (note,) = notes
    assert note.startswith("state/events/r1/timeline.json cannot be read: ")


def test_the_report_of_a_run_without_events(tmp_path):
    """As it is in an object store: the page has the chart, the times and the rate of the records."""
    events = data.run_events()
    rows = [data.index_row(n, clip=None) for n in range(3)]
    data.write_parts(tmp_path, "index", rows)
    write_records(Store(str(tmp_path)), events, at=data.T0.timestamp() + 400, rate=71.0, started_at=data.T0.isoformat())
    page = Path(write_report(str(tmp_path))).read_text()
    assert "stage1-2" in page and "replica lost: rank 0 died" in page and "71 clips/h" in page and "6 min 40 s" in page
