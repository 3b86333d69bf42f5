"""The events of a run: each is written once and in order whatever the store does, and none holds up the run."""

from __future__ import annotations

import io
import json
import threading
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from ltx_ray.driver import events
from ltx_ray.driver.events import EventLog
from ltx_ray.stages import Stage
from ltx_ray.storage.store import Store

FOLDER = "state/events/r1"


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture
def local(tmp_path) -> Store:
    return Store(str(tmp_path))


def segment(store: Store, name: str) -> str:
    data = store.read_bytes(f"{FOLDER}/{name}")
    if name.endswith(".zst"):
        data = pa.CompressedInputStream(io.BytesIO(data), "zstd").read()
    return data.decode()


def lines(store: Store) -> list[dict]:
    """Every event in the output, in the order of the files."""
    text = "".join(segment(store, name) for name in store.list_names(FOLDER))
    if store.exists("events.jsonl"):
        text += store.read_bytes("events.jsonl").decode()
    return [json.loads(line) for line in text.splitlines()]


def numbers(store: Store) -> list[int]:
    return [event["n"] for event in lines(store)]


def eventually(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def refuse_writes(monkeypatch, log: EventLog) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(log._log._store, "write_bytes", refuse)
    monkeypatch.setattr(log._log._store, "append_text", refuse)


def test_every_event_is_there_once_and_in_order(store):
    log = EventLog(store, "r1")
    log.emit("a", n=1)
    log.flush()
    log.emit("b", n=2, text="\ud800 é")
    log.flush()
    log.flush()
    assert numbers(store) == [1, 2]
    assert [event["event"] for event in lines(store)] == ["a", "b"]


def test_a_local_log_begins_with_an_empty_file(local):
    local.write_bytes("events.jsonl", b"older")
    EventLog(local, "r1")
    assert local.read_bytes("events.jsonl") == b""


def test_in_an_object_store_segments_are_written_once_and_nothing_else(bucket, monkeypatch):
    store = Store(bucket)
    log, written, write = EventLog(store, "r1"), [], Store.write_bytes
    monkeypatch.setattr(Store, "write_bytes", lambda self, name, data: (written.append(name), write(self, name, data)))
    for n in range(3):
        log.emit("a", n=n)
        log.flush()
    assert written == [f"{FOLDER}/{n:06d}.jsonl.zst" for n in (1, 2, 3)]
    assert not store.exists("events.jsonl") and numbers(store) == [0, 1, 2]


def test_a_thousand_replicas_that_start_at_once_are_no_thousand_objects(bucket):
    store = Store(bucket)
    log = EventLog(store, "r1")
    for n in range(1000):
        log.emit("gang_started", n=n)
    log.flush()
    assert store.list_names(FOLDER) == ["000001.jsonl.zst"] and numbers(store) == list(range(1000))


def test_full_segments_of_a_local_log_move_away(local, monkeypatch):
    monkeypatch.setattr(events, "SEGMENT_BYTES", 1000)
    log = EventLog(local, "r1")
    for n in range(50):
        log.emit("a", n=n, text="x" * 60)
        log.flush()
        assert local.size("events.jsonl") < 1000 + 120
    names = local.list_names(FOLDER)
    assert names == [f"{n:06d}.jsonl.zst" for n in range(1, len(names) + 1)] and len(names) >= 4
    assert numbers(local) == list(range(50))
    assert len(local.read_bytes(f"{FOLDER}/{names[0]}")) < len(segment(local, names[0])) / 2


@pytest.mark.parametrize("broken", ["move", "write_bytes", "read_bytes", "delete"])
def test_a_crash_or_a_full_disk_while_a_segment_ends_leaves_every_event_in_one_file(local, monkeypatch, broken):
    monkeypatch.setattr(events, "SEGMENT_BYTES", 300)
    log = EventLog(local, "r1")
    log.emit("a", n=0)
    log.flush()
    kept, fails = getattr(log._log._store, broken), [True]

    def refuse(*args):
        if fails:
            raise OSError("no space left on device")
        return kept(*args)

    monkeypatch.setattr(log._log._store, broken, refuse)
    for n in range(1, 12):
        log.emit("a", n=n, text="x" * 60)
        log.flush()

    def by_number() -> list[str]:
        """One file of each segment: its plain form, as long as that is there."""
        names = sorted({name.removesuffix(".zst") for name in local.list_names(FOLDER)})
        there = local.list_names(FOLDER)
        return [name if name in there else f"{name}.zst" for name in names]

    def found() -> list[int]:
        text = "".join(segment(local, name) for name in by_number())
        if local.exists("events.jsonl"):
            text += local.read_bytes("events.jsonl").decode()
        return [json.loads(line)["n"] for line in text.splitlines()]

    now = found()
    assert now == list(range(len(now))), "some may wait for the disk, and none is there twice"
    fails.clear()
    log.flush()
    assert found() == list(range(12))


def test_lines_that_could_not_be_written_come_with_the_next(store, monkeypatch):
    log = EventLog(store, "r1")
    log.emit("a", n=1)
    log.flush()
    with monkeypatch.context() as broken:
        refuse_writes(broken, log)
        log.emit("b", n=2)
        log.flush()
        log.emit("c", n=3)
        log.flush()
        assert numbers(store) == [1]
    log.emit("d", n=4)
    log.flush()
    assert numbers(store) == [1, 2, 3, 4]


def test_a_segment_whose_answer_was_lost_is_there_once(bucket, monkeypatch):
    store = Store(bucket)
    log = EventLog(store, "r1")
    write = log._log._store.write_bytes

    def lose_the_answer(name: str, data: bytes) -> None:
        write(name, data)
        raise OSError("connection reset")

    with monkeypatch.context() as broken:
        broken.setattr(log._log._store, "write_bytes", lose_the_answer)
        for n in range(3):
            log.emit("a", n=n)
            log.flush()
    log.emit("a", n=3)
    log.flush()
    assert numbers(store) == [0, 1, 2, 3]


def test_a_log_whose_first_write_failed_holds_no_line_of_the_older_run(local, monkeypatch):
    local.write_bytes("events.jsonl", b'{"n": 0}\n')
    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_bytes", lambda *a: (_ for _ in ()).throw(OSError("no")))
        log = EventLog(local, "r1")
        log.emit("a", n=1)
        log.flush()
        assert numbers(local) == [0]
    log.flush()
    assert numbers(local) == [1]


def test_gang_started_is_there_at_once(local, monkeypatch):
    monkeypatch.setattr(events, "_FLUSH_SECONDS", 3600.0)
    log = EventLog(local, "r1")
    log.emit("gang_starting", n=1)
    log.emit("gang_started", n=2, ranks=[{"rank": 0, "pid": 1234}])
    eventually(lambda: numbers(local) == [1, 2])


def test_other_events_are_there_soon_though_none_follows(local, monkeypatch):
    monkeypatch.setattr(events, "_FLUSH_SECONDS", 0.3)
    log = EventLog(local, "r1")
    log.emit("a", n=1)
    eventually(lambda: numbers(local) == [1])
    eventually(lambda: log._thread is None)
    log.emit("a", n=2)
    eventually(lambda: numbers(local) == [1, 2])


def test_a_slow_upload_holds_up_no_event(bucket, monkeypatch):
    monkeypatch.setattr(events, "_REMOTE_FLUSH_SECONDS", 0.0)
    store = Store(bucket)
    log = EventLog(store, "r1")
    gate, write, writers, opened = threading.Event(), log._log._store.write_bytes, [], []

    def slow(name: str, data: bytes) -> None:
        writers.append(threading.current_thread().name)
        opened.append(gate.wait(60))
        write(name, data)

    monkeypatch.setattr(log._log._store, "write_bytes", slow)
    log.emit("a", n=0)
    eventually(lambda: writers == ["events"])
    for n in range(1, 1000):
        log.emit("a", n=n)
    assert writers == ["events"], "one upload at a time, on its own thread"
    gate.set()
    log.flush()
    assert all(opened), "events waited for the upload"
    assert numbers(store) == list(range(1000))


def test_of_events_that_wait_too_long_the_oldest_are_given_up_and_counted(local, monkeypatch):
    monkeypatch.setattr(events, "_MOST_PENDING", 2000)
    log = EventLog(local, "r1")
    with monkeypatch.context() as broken:
        refuse_writes(broken, log)
        for n in range(100):
            log.emit("a", n=n, text="x" * 60)
            log.flush()
    log.flush()
    lost, *kept = lines(local)
    assert lost["event"] == "events_lost" and 0 < len(kept) < 30
    assert [event["n"] for event in kept] == list(range(lost["count"], 100))
    log.emit("a", n=100)
    log.flush()
    assert len([event for event in lines(local) if event["event"] == "events_lost"]) == 1


def test_memory_does_not_grow_with_the_events(local, monkeypatch):
    """Events of 20,000 clips on four replicas."""
    monkeypatch.setattr(events, "SEGMENT_BYTES", 1 << 18)

    def clips(first: int) -> None:
        for n in range(first, first + 5000):
            for stage in ("text", "stage1", "stage2", "decode"):
                log.emit("call", role=stage, replica=f"{stage}-0", stage=stage, item_id=f"{n:032x}", id=f"clip-{n}",
                         start=1e9 + 40.0 * n, seconds=30.0, ok=True)  # fmt: skip
            log.emit("item_finished", item_id=f"{n:032x}", id=f"clip-{n}")
        log.flush()

    log = EventLog(local, "r1")
    clips(0)
    tracemalloc.start()
    try:
        clips(5000)
        first = tracemalloc.get_traced_memory()[0]
        clips(10_000)
        clips(15_000)
        assert tracemalloc.get_traced_memory()[0] - first < 200_000
    finally:
        tracemalloc.stop()
    assert log.summary.summary(0.0, None).events == {"call": 80_000, "item_finished": 20_000}
    assert len(log.summary.timeline().json()) < 100_000
    assert sum(segment(local, name).count("\n") for name in local.list_names(FOLDER)) > 90_000


def test_credentials_stand_in_no_event(local):
    log = EventLog(local, "r1")
    log.emit("warning", n=1, message="s3://KEY:SECRET@bucket/x cannot be read")
    log.flush()
    assert "SECRET" not in local.read_bytes("events.jsonl").decode()


def test_the_summary_has_every_event_at_once(local):
    log = EventLog(local, "r1")
    for n in range(3):
        log.emit(
            "call", role="dit", replica="dit-0", stage=Stage.STAGE1, id=f"clip-{n}", start=1e9, seconds=1.0, ok=True
        )
        assert log.summary.summary(0.0, None).events == {"call": n + 1}
        assert log.summary.summary(0.0, None).replicas["dit-0"].id == f"clip-{n}"
    assert log.summary.summary(0.0, None).replicas["dit-0"].stage == "stage1"


def test_a_text_that_utf_8_cannot_hold_costs_no_other_event(local):
    log = EventLog(local, "r1")
    log.emit("warning", n=1, message="a file's name: \udcff", path=Path("x"))
    log.emit("warning", n=2, message="é", path=Path("x"))
    log.flush()
    assert [(event["n"], event["message"], event["path"]) for event in lines(local)] == [
        (1, "a file's name: ?", "x"), (2, "é", "x"),
    ]  # fmt: skip
