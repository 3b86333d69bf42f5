"""The lease on an output: one run holds it, a dead run's lease is taken over, and a lost one is noticed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time

import pytest

from ltx_ray.storage import lease as lease_module
from ltx_ray.storage.lease import Lease, holder, write_fenced
from ltx_ray.storage.store import Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """An empty store, on a disk and in a bucket."""
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def _no_lease_is_renewed_after_its_test(monkeypatch):
    made: list[Lease] = []
    init = Lease.__init__

    def remembered(self, *arguments) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Lease, "__init__", remembered)
    yield
    for lease in made:
        lease._released.set()
        if lease._thread is not None:
            lease._thread.join(timeout=120)


def leave_lease(store: Store, file: str = lease_module.LEASE_FILE, **changes) -> None:
    space = lease_module._pid_namespace()
    entry = {"run_id": "other", "host": "elsewhere", "pid": 1, "pids": space, "expires": time.time() + 60, **changes}
    store.write_bytes(file, json.dumps(entry).encode())


def holder_id(store: Store) -> str:
    return json.loads(store.read_bytes(lease_module.LEASE_FILE))["run_id"]


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Clock:
    """The clock of a waiting run, which its naps alone advance. `each_nap` is what happens during one."""

    def __init__(self) -> None:
        self.now, self.each_nap = 1000.0, lambda: None

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.now += seconds
        assert self.now < 2000, "waits for ever"
        self.each_nap()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module.time, "sleep", clock.sleep)
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock.now)
    return clock


def test_a_free_output_is_taken_and_given_back(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert (holder(store).run_id, holder(store).pid, holder(store).epoch) == ("mine", os.getpid(), 1)
    lease.release()
    assert holder(store) is None


def test_every_holder_has_a_higher_epoch(store):
    for epoch in (1, 2, 3):
        lease = Lease(store, "same name")
        lease.acquire(pytest.fail)
        assert lease.epoch == epoch == holder(store).epoch
        lease.release()
    leave_lease(store, host=socket.gethostname(), pid=dead_pid(), epoch=7)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert lease.epoch == 8


def test_a_lease_that_does_not_change_for_a_minute_is_taken_over(store, clock):
    """Whatever the clock of its host says."""
    leave_lease(store, expires=time.time() + 1e6)
    messages: list[str] = []
    Lease(store, "mine").acquire(messages.append)
    assert 60 <= clock.now - 1000 < 63 and holder(store).run_id == "mine"
    assert len(messages) == 1 and "is in use by run other on elsewhere; waiting for it" in messages[0]


def test_a_lease_that_is_renewed_is_waited_for(store, clock):
    """Also when the clock of its host is hours behind."""
    leave_lease(store, expires=0.0, beat=0)
    lease = Lease(store, "mine")

    def renew() -> None:
        if clock.now < 1200:
            leave_lease(store, expires=0.0, beat=clock.now // 15)
        elif clock.now < 1204:
            store.write_bytes(lease_module.LEASE_FILE, lease_module._UNREADABLE.encode())  # given back

    clock.each_nap = renew
    lease.acquire(lambda message: None)
    assert 1200 <= clock.now < 1204


@pytest.mark.parametrize("wait_seconds", [0.0, 100.0])
def test_a_run_that_does_not_wait_for_ever_is_refused_once_the_other_is_seen_to_be_alive(store, clock, wait_seconds):
    leave_lease(store, expires=0.0, beat=0)
    clock.each_nap = lambda: leave_lease(store, expires=0.0, beat=clock.now // 15)
    messages: list[str] = []
    with pytest.raises(ValueError) as refusal:
        Lease(store, "mine").acquire(messages.append, wait_seconds)
    assert f"{store.name}, in use by run other on elsewhere; legal: the same command once that" in str(refusal.value)
    assert max(2, wait_seconds) <= clock.now - 1000 <= max(17, wait_seconds + 2)
    assert len(messages) == 1 and f"waiting for it for up to {wait_seconds:g} s" in messages[0]
    assert holder_id(store) == "other"


def test_a_run_that_does_not_wait_takes_over_from_one_that_was_killed_elsewhere(store, clock):
    leave_lease(store, expires=time.time() + 1e6)
    Lease(store, "mine").acquire(lambda message: None, 0.0)
    assert clock.now >= 1060 and holder_id(store) == "mine"


def test_a_run_that_does_not_wait_is_refused_at_once_beside_one_on_this_machine(store, clock):
    leave_lease(store, host=socket.gethostname(), pid=os.getpid())
    with pytest.raises(ValueError, match="in use by run other"):
        Lease(store, "mine").acquire(pytest.fail, 0.0)
    assert clock.now == 1000 and holder_id(store) == "other"


def test_every_run_that_is_waited_for_is_named_once(store, clock):
    """One that was waited for ends, and another is faster than this one."""
    leave_lease(store, beat=0)

    def renew() -> None:
        if clock.now < 1060:
            leave_lease(store, run_id="other" if clock.now < 1030 else "a third", beat=clock.now // 15)
        else:
            store.write_bytes(lease_module.LEASE_FILE, lease_module._UNREADABLE.encode())

    clock.each_nap, messages = renew, list[str]()
    Lease(store, "mine").acquire(messages.append)
    assert [message.partition(" is in use by run ")[2].split(" on ")[0] for message in messages] == ["other", "a third"]


@pytest.mark.parametrize("kind", ["dead", "unreadable"])
def test_a_lease_that_nobody_holds_is_taken_at_once(store, kind):
    if kind == "dead":
        leave_lease(store, host=socket.gethostname(), pid=dead_pid())
    else:
        store.write_bytes(lease_module.LEASE_FILE, b"[]")
    assert holder(store) is None
    Lease(store, "mine").acquire(pytest.fail)
    assert holder(store).run_id == "mine"


def test_a_process_of_another_container_is_not_considered_dead(store, clock):
    """It has this host's name, and a pid of another namespace."""
    leave_lease(store, host=socket.gethostname(), pid=dead_pid(), pids="another boot pid:[1]")
    messages: list[str] = []
    Lease(store, "mine").acquire(messages.append)
    assert len(messages) == 1 and clock.now >= 1060


def test_a_live_run_on_this_machine_holds_its_lease(store):
    leave_lease(store, host=socket.gethostname(), pid=os.getpid())
    assert holder(store).run_id == "other"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"expires": "soon", "pid": 1}', b"\xff"])
@pytest.mark.parametrize("file", [lease_module.LEASE_FILE, "_lease.json"])
def test_an_unreadable_lease_counts_as_none(tmp_path, content, file):
    store = Store(str(tmp_path))
    store.write_bytes(file, content)
    assert holder(store) is None
    Lease(store, "mine").acquire(pytest.fail)
    assert holder(store).run_id == "mine"


def test_a_live_run_of_the_version_before_is_waited_for(store, clock):
    leave_lease(store, "_lease.json")
    assert holder(store).run_id == "other"

    def end() -> None:
        if clock.now > 1100:
            store.delete("_lease.json")

    clock.each_nap = end
    messages: list[str] = []
    Lease(store, "mine").acquire(messages.append)
    assert clock.now > 1100 and len(messages) == 1 and holder(store).run_id == "mine"


@pytest.mark.parametrize("changes", [{"expires": 0.0}, {"host": socket.gethostname(), "pid": 2**22 + 1}])
def test_a_run_of_the_version_before_that_has_ended_is_not_waited_for(store, changes):
    leave_lease(store, "_lease.json", **changes)
    Lease(store, "mine").acquire(pytest.fail)
    assert holder(store).run_id == "mine"


def test_a_thread_renews_the_lease_until_it_is_released(store, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    before = holder(store)
    eventually(lambda: holder(store).expires != before.expires)
    assert not lease.lost and holder(store).epoch == before.epoch
    lease.release()
    time.sleep(0.2)
    assert holder(store) is None


def test_releasing_leaves_the_lease_of_the_run_that_took_over(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    leave_lease(store)
    lease.release()
    assert holder(store).run_id == "other"


def test_a_run_that_is_stopped_while_it_waits_leaves_the_lease_alone(store, clock):
    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    leave_lease(store)
    clock.each_nap = stop
    with pytest.raises(Stopped):
        Lease(store, "mine").acquire(lambda message: None)
    assert holder(store).run_id == "other"


# --- simultaneous runs, stores that do not answer -------------------------------------------------


def eventually(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("found", ["nothing", "dead", "given back"])
def test_of_runs_that_start_at_the_same_moment_one_holds_the_lease(store, found, monkeypatch):
    """All runs find the output free before any of them writes. Each then holds the lease in turn."""
    monkeypatch.setattr(lease_module, "_POLL_SECONDS", 0.05)
    if found == "dead":
        leave_lease(store, host=socket.gethostname(), pid=dead_pid(), epoch=1)
    elif found == "given back":
        store.write_bytes(lease_module.LEASE_FILE, lease_module._UNREADABLE.encode())
    count = 3
    barrier, holding, holders, epochs = threading.Barrier(count), [], [], []
    read = lease_module._read

    def read_together(store: Store):
        entry = read(store)
        if threading.current_thread().name.startswith("run") and not getattr(ready, "met", False):
            ready.met = True
            barrier.wait(timeout=120)
        return entry

    ready = threading.local()
    monkeypatch.setattr(lease_module, "_read", read_together)

    def run(name: str) -> None:
        lease = Lease(Store(store.uri), name)
        lease.acquire(lambda message: None)
        holding.append(name)
        holders.append(len(holding))
        time.sleep(0.3)
        assert not lease.lost
        holding.remove(name)
        epochs.append(lease.epoch)
        lease.release()

    threads = [threading.Thread(target=run, args=(f"r{n}",), name=f"run{n}") for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    first = 2 if found == "dead" else 1
    assert epochs == [first, first + 1, first + 2] and holders == [1, 1, 1]


def test_a_lease_that_another_run_took_over_is_lost(store, monkeypatch):
    """This happens to a process that was suspended for longer than its lease lasts."""
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert not lease.lost
    leave_lease(store)
    eventually(lambda: lease.lost)
    lease.release()
    assert holder(store).run_id == "other", "the lease stays with the other run"


def test_a_deleted_lease_is_written_again(store, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    store.delete(lease_module.LEASE_FILE)
    eventually(lambda: holder(store) is not None)
    assert holder(store).run_id == "mine" and not lease.lost
    lease.release()


def test_a_store_that_does_not_answer_is_not_a_free_output(tmp_path, monkeypatch):
    store = Store(str(tmp_path), retry_seconds=0)
    leave_lease(store)

    def silent(self, relative: str) -> bytes:
        raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(Store, "read_versioned", silent)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Lease(store, "mine").acquire(pytest.fail)
    assert holder(store) is None, "holder() only informs people, so it does not raise"


def test_a_lease_survives_a_store_that_fails_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "_RENEW_RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    before, write, failed = holder(store).expires, Store.update, []

    def refuse(self, relative: str, data: bytes, version: str) -> bool:
        failed.append(relative)
        raise OSError("no")

    monkeypatch.setattr(Store, "update", refuse)
    eventually(lambda: len(failed) > 2)
    monkeypatch.setattr(Store, "update", write)
    eventually(lambda: holder(store).expires != before)
    assert not lease.lost
    lease.release()


# --- records that a run without its lease must not replace ------------------------------------------


def written(store: Store, epoch: int, run_id: str) -> bool:
    return write_fenced(store, "run.json", json.dumps({"run_id": run_id, "epoch": epoch}).encode(), epoch)


def test_the_record_of_a_later_holder_is_not_replaced(store):
    assert written(store, 4, "former")
    assert written(store, 5, "é")
    assert not written(store, 4, "former")
    assert written(store, 5, "later")
    assert json.loads(store.read_bytes("run.json")) == {"run_id": "later", "epoch": 5}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"epoch": "x"}', b'{"run_id": "of 0.1"}', b"\xff"])
def test_a_record_without_an_epoch_is_replaced(tmp_path, content):
    store = Store(str(tmp_path))
    store.write_bytes("run.json", content)
    assert written(store, 1, "mine")
    assert json.loads(store.read_bytes("run.json"))["run_id"] == "mine"


def test_a_record_that_changes_before_it_is_replaced_is_looked_at_again(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    written(store, 1, "mine")
    update = Store.update

    def overtaken(self, relative: str, data: bytes, version: str) -> bool:
        monkeypatch.setattr(Store, "update", update)
        assert written(store, 2, "other")
        return self.update(relative, data, version)

    monkeypatch.setattr(Store, "update", overtaken)
    assert not written(store, 1, "mine")
    assert json.loads(store.read_bytes("run.json"))["run_id"] == "other"
