"""`run.json`, and the records of the run before."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, RequestedNumerics
from ltx_ray.dataset.run_summary import SummaryBuilder, read_run
from ltx_ray.dataset.timeline import parse_timeline
from ltx_ray.driver import run_record
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.run_record import RunRecord, SoFar, keep_older_run, last_lines, recorded_counts
from ltx_ray.placement.sizing import ParallelConfig, lay_out
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import RELEASED


def record(store: Store, run_id: str = "r1", epoch: int = 1, **requested) -> RunRecord:
    return RunRecord(
        store,
        run_id=run_id,
        epoch=epoch,
        command=["ltx-ray", "render"],
        manifest="m.jsonl",
        output="out",
        checkpoint=Checkpoint("ltx.safetensors", "2.3.0", RELEASED, {}, 1),
        parallel=ParallelConfig(tp=2, guidance_parallel=3),
        requested=RequestedNumerics(**requested),
    )


def test_a_run_that_lost_its_lease_does_not_replace_the_record_of_its_successor(tmp_path):
    store = Store(str(tmp_path))
    former, later = record(store, "former", epoch=3), record(store, "later", epoch=4)
    former.write("running", SoFar({}))
    later.write("running", SoFar({}))
    former.write("finished", SoFar({}))
    found = json.loads(store.read_bytes("run.json"))
    assert (found["run_id"], found["epoch"], found["state"]) == ("later", 4, "running")


def test_before_the_cluster_is_joined_the_numerics_are_those_asked_for(tmp_path):
    store = Store(str(tmp_path))
    record(store, precision="fp8", device="cuda").write("running", SoFar({"rows": 2}, expected_rows=7))
    found = json.loads(store.read_bytes("run.json"))
    assert found["numerics"] == {
        "attention": "auto", "compile": "auto", "device": "cpu", "dtype": "bfloat16", "guidance_batching": 1,
        "guidance_parallel": 3, "noise_device": "model", "precision": "fp8", "sequence_parallel": 1, "stage2_tp": 2,
        "text_batch": 1, "text_tokens": 1024, "tp": 2,
    }  # fmt: skip
    assert (found["state"], found["finished_at"], found["pools"], found["tp"]) == ("running", None, {}, 2)
    assert found["counts"] == {"rows": 2, "rendered": 0, "already_done": 0, "failed": 0, "illegal": 0}
    assert found["expected_rows"] == 7


def test_afterwards_they_are_the_resolved_ones(tmp_path):
    store, numerics = Store(str(tmp_path)), Numerics(device="cuda", attention="fa3", compile="fused")
    spec = EngineSpec("m:E", ModelFiles("c", "g", "u"), numerics, "out")
    a_record = record(store)
    a_record.place(lay_out(ParallelConfig(), 8, dict.fromkeys(("text", "diffusion", "decode"), spec)), numerics)
    a_record.write("finished", SoFar({"rows": 1, "rendered": 1, "calls": 9}))
    found = json.loads(store.read_bytes("run.json"))
    assert (found["numerics"]["attention"], found["device"], found["state"]) == ("fa3", "cuda", "finished")
    assert found["pools"] == {"text": 1, "stage1": 5, "stage2": 2, "decode": 1} and found["finished_at"]
    assert "calls" not in found["counts"]


@pytest.mark.parametrize("state", ["finished", "drained", "failed"])
def test_the_rate_of_a_run_that_has_ended_is_its_clips_over_its_time(tmp_path, monkeypatch, state):
    times = iter(["2026-11-23T10:00:00.000+00:00", "2026-11-23T10:00:12.500+00:00"])
    monkeypatch.setattr(run_record, "_now", lambda: next(times))
    store = Store(str(tmp_path))
    a_record = record(store)
    for unfinished in ("running", "draining"):
        a_record.write(unfinished, SoFar({"rows": 9}, clips=1))
        found = json.loads(store.read_bytes("run.json"))
        assert (found["state"], found["finished_at"], found["clips_per_hour"]) == (unfinished, None, None)
    # Five million rows were done before, and one row shares its clip with another.
    a_record.write(state, SoFar({"rows": 5_000_007, "already_done": 5_000_000, "rendered": 7}, clips=6))
    found = json.loads(store.read_bytes("run.json"))
    assert (found["clips"], found["clips_per_hour"], a_record.clips_per_hour) == (6, 1728.0, 1728.0)
    assert 6 / 12.5 * 3600 == 1728


def a_call(replica: str = "stage1-0") -> dict:
    return {"t": 110.0, "event": "call", "role": "stage1", "replica": replica, "stage": "stage1", "id": "cat",
            "start": 100.0, "seconds": 10.0, "ok": True}  # fmt: skip


def test_the_summary_is_in_the_record_and_the_timeline_beside_the_events(tmp_path):
    store, summary = Store(str(tmp_path)), SummaryBuilder()
    summary.add(a_call())
    summary.add({"t": 120.0, "event": "item_failed", "id": "x", "message": "s3://KEY:SECRET@bucket/x"})
    record(store).write("running", SoFar({"rows": 2}, 1, summary, rate=36.0))
    found = json.loads(store.read_bytes("run.json"))
    assert found["summary"]["replicas"] == {"stage1-0": {"stage": "stage1", "id": "cat", "seconds": 10.0, "t": 110.0}}
    assert found["summary"]["clips_per_hour"] == 36.0 and found["clips_per_hour"] is None
    text = store.read_bytes("state/events/r1/timeline.json").decode()
    assert "SECRET" not in text and "failed in" in text
    known = read_run(store, found, now=None)
    assert known.timeline == parse_timeline(text) and known.clips_per_hour == 36.0


def test_a_record_is_refreshed_when_it_is_due_and_no_refresh_comes_after_the_end(bucket, monkeypatch):
    store, now = Store(bucket), [1000.0]
    monkeypatch.setattr(run_record, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    a_record = record(store)
    assert a_record.due
    a_record.write("draining", SoFar({"rows": 2}))
    assert not a_record.due
    now[0] += 59.0
    assert not a_record.due
    now[0] += 2.0
    assert a_record.due
    gate, write = threading.Event(), a_record._store.write_bytes

    def slow(name: str, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(120)
        write(name, data)

    monkeypatch.setattr(a_record._store, "write_bytes", slow)
    a_record.refresh(SoFar({"rows": 3}, 0))
    now[0] += 3600.0
    assert not a_record.due, "one at a time"
    threading.Timer(0.2, gate.set).start()
    a_record.write("drained", SoFar({"rows": 3}))
    found = json.loads(store.read_bytes("run.json"))
    assert (found["state"], found["counts"]["rows"]) == ("drained", 3)


def test_a_refresh_keeps_the_state(tmp_path):
    store = Store(str(tmp_path))
    a_record = record(store)
    a_record.write("draining", SoFar({"rows": 2}))
    a_record.refresh(SoFar({"rows": 2, "rendered": 1}, 1))
    a_record._refresh.join()
    found = json.loads(store.read_bytes("run.json"))
    assert (found["state"], found["counts"]["rendered"], found["clips"]) == ("draining", 1, 1)


def test_a_record_of_a_thousand_replicas_stays_small(tmp_path):
    summary, store = SummaryBuilder(), Store(str(tmp_path))
    for n in range(20_000):
        summary.add(a_call(f"stage1-{n % 1000}") | {"t": 100.0 + n, "start": 90.0 + n})
    record(store).write("running", SoFar({}, 0, summary))
    assert store.size("run.json") < 200_000 and store.size("state/events/r1/timeline.json") < 200_000


def test_the_records_of_the_run_before_are_kept(tmp_path):
    store = Store(str(tmp_path))
    keep_older_run(store)
    assert store.list_names("runs", recursive=True) == []
    record(store, "r1").write("finished", SoFar({}))
    store.write_bytes("events.jsonl", b"{}")
    keep_older_run(store)
    record(store, "r2").write("running", SoFar({}))
    assert json.loads(store.read_bytes("runs/r1/run.json"))["run_id"] == "r1"
    assert store.read_bytes("runs/r1/events.jsonl") == b"{}" and not store.exists("runs/r1/report.html")
    assert not store.exists("events.jsonl"), "it is renamed, and the new run begins its own"


def test_events_of_the_run_before_are_not_read(tmp_path, monkeypatch):
    store, read = Store(str(tmp_path)), Store.read_bytes
    record(store, "r1").write("finished", SoFar({}))
    store.write_bytes("events.jsonl", b"{}")
    store.write_bytes("state/events/r1/000001.jsonl.zst", b"x")
    names: list[str] = []
    monkeypatch.setattr(Store, "read_bytes", lambda self, name: (names.append(name), read(self, name))[1])
    keep_older_run(store)
    EventLog(store, "r2")
    assert set(names) == {"run.json"}


def test_a_run_that_died_before_it_had_a_record_takes_no_events_from_the_run_before(tmp_path):
    store = Store(str(tmp_path))
    record(store, "r1").write("finished", SoFar({}))
    store.write_bytes("events.jsonl", b"of r1")
    keep_older_run(store)
    EventLog(store, "r2")
    keep_older_run(store)
    assert store.read_bytes("runs/r1/events.jsonl") == b"of r1"
    EventLog(store, "r3")
    assert store.read_bytes("events.jsonl") == b""


def test_events_that_an_earlier_version_wrote_into_an_object_store_are_kept(bucket):
    store = Store(bucket)
    record(store, "r1").write("finished", SoFar({}))
    store.write_bytes("events.jsonl", b"{}")
    keep_older_run(store)
    assert store.read_bytes("runs/r1/events.jsonl") == b"{}" and not store.exists("events.jsonl")


@pytest.mark.parametrize("content", [b"null", b"[1]", b"{", b"{}", b'{"run_id": 7}', b'{"run_id": "../../elsewhere"}'])
def test_a_record_that_is_none_is_not_kept(tmp_path, content):
    store = Store(str(tmp_path / "a" / "b"))
    store.write_bytes("run.json", content)
    keep_older_run(store)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run.json"]


def test_a_run_that_has_finished_says_how_rows_at_fault_are_rendered_again():
    counts = recorded_counts({"rows": 9, "rendered": 4, "failed": 3, "illegal": 2})
    (*told, last) = last_lines("finished", counts, 2, None, "/out")
    assert len(told) == 1 and told[0].startswith("2 rows failed by their own fault") and "retry /out " in told[0]
    assert last == "finished: 9 rows, 4 rendered, 3 failed, 2 illegal, listed in /out/failed"
    assert list(last_lines("finished", counts, 0, None, "/out")) == [last], "failures of the infrastructure and illegal"
    assert len(list(last_lines("drained", counts, 2, None, "/out"))) == 1
    assert list(last_lines("finished", counts, 2, None, "/out", is_retry=True)) == [last], "it passes over none"
