"""events.jsonl holds every event once and in order whatever the store does, and never holds up the run."""

from __future__ import annotations

import json
import threading
import time

import pytest

from ltx_ray.driver import events
from ltx_ray.driver.events import EventLog
from ltx_ray.storage.store import Store


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket"))


def numbers(store: Store) -> list[int]:
    return [json.loads(line)["n"] for line in store.read_bytes("events.jsonl").decode().splitlines()]


def eventually(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def refuse_writes(monkeypatch, log: EventLog) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(log._store, "write_bytes", refuse)
    monkeypatch.setattr(log._store, "append_text", refuse)


def test_a_new_log_replaces_that_of_the_older_run(store):
    store.write_bytes("events.jsonl", b"older")
    log = EventLog(store)
    assert store.read_bytes("events.jsonl") == b""
    log.emit("a", n=1)
    log.flush()
    log.emit("b", n=2, text="\ud800 é")
    log.flush()
    assert numbers(store) == [1, 2]


def test_lines_that_could_not_be_written_come_with_the_next(store, monkeypatch):
    log = EventLog(store)
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


def test_a_log_whose_first_write_failed_holds_no_line_of_the_older_run(store, monkeypatch):
    store.write_bytes("events.jsonl", b'{"n": 0}\n')
    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_bytes", lambda *a: (_ for _ in ()).throw(OSError("no")))
        log = EventLog(store)
        log.emit("a", n=1)
        log.flush()
    assert numbers(store) == [0]
    log.flush()
    assert numbers(store) == [1]


def test_a_slow_upload_holds_up_no_event(bucket, monkeypatch):
    monkeypatch.setattr(events, "_REMOTE_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(events, "_UPLOAD_INTERVAL_FACTOR", 0.0)
    store = Store(bucket)
    log = EventLog(store)
    gate, write, writers = threading.Event(), log._store.write_bytes, []

    def slow(name: str, data: bytes) -> None:
        writers.append(threading.current_thread().name)
        assert gate.wait(20)
        write(name, data)

    monkeypatch.setattr(log._store, "write_bytes", slow)
    began = time.monotonic()
    for n in range(1000):
        log.emit("a", n=n)
    assert time.monotonic() - began < 2 and writers == ["events"], "one upload at a time, on its own thread"
    gate.set()
    eventually(lambda: len(numbers(store)) == 1)
    log.flush()
    assert numbers(store) == list(range(1000))


def test_uploads_of_a_long_log_come_less_often(bucket, monkeypatch):
    log = EventLog(Store(bucket))
    assert log._period == events._REMOTE_FLUSH_SECONDS
    monkeypatch.setattr(log._store, "write_bytes", lambda name, data: time.sleep(0.2))
    monkeypatch.setattr(events, "_REMOTE_FLUSH_SECONDS", 1.0)
    log.flush()
    assert log._period == pytest.approx(events._UPLOAD_INTERVAL_FACTOR * 0.2, rel=0.5)
