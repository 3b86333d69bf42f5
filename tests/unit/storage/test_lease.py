"""The lease on an output: one run at a time, taken over from the dead, and noticed when it is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time

import pytest

from ltx_ray.storage import lease as lease_module
from ltx_ray.storage.lease import Lease, holder
from ltx_ray.storage.store import Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """An empty store, on a disk and in a bucket."""
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def _short_settling(monkeypatch):
    monkeypatch.setattr(lease_module, "_SETTLE_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def _none_is_renewed_after_its_test(monkeypatch):
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
            lease._thread.join(timeout=10)


def leave_lease(store: Store, **changes) -> None:
    space = lease_module._pid_namespace()
    entry = {"run_id": "other", "host": "elsewhere", "pid": 1, "pids": space, "expires": time.time() + 60, **changes}
    store.write_bytes("_lease.json", json.dumps(entry).encode())


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def waits(store, monkeypatch) -> list[float]:
    """Sleeps of a waiting run; each returns at once, and in the third the other's lease runs out."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds != lease_module._POLL_SECONDS:
            return
        slept.append(seconds)
        assert len(slept) <= 3, "waits for ever"
        if len(slept) == 3:
            leave_lease(store, expires=time.time() - 1)

    monkeypatch.setattr(lease_module.time, "sleep", sleep)
    return slept


def test_a_free_output_is_taken_and_given_back(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert holder(store).run_id == "mine"
    assert holder(store).pid == os.getpid()
    lease.release()
    assert holder(store) is None
    assert not store.exists("_lease.json")


def test_a_run_waits_for_another_and_says_so_once(store, waits):
    leave_lease(store)
    said = []
    Lease(store, "mine").acquire(said.append)
    assert len(waits) == 3
    assert len(said) == 1 and "in use by run other on elsewhere" in said[0]
    assert holder(store).run_id == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("stale", ["expired", "own", "dead"])
def test_a_stale_lease_is_taken_over(store, stale):
    changes = {
        "expired": {"expires": time.time() - 1},
        "own": {"run_id": "mine"},
        "dead": {"host": socket.gethostname(), "pid": dead_pid()},
    }[stale]
    leave_lease(store, **changes)
    Lease(store, "mine").acquire(pytest.fail)
    assert holder(store).run_id == "mine"


def test_a_live_run_on_this_machine_holds_its_lease(store):
    leave_lease(store, host=socket.gethostname(), pid=os.getpid())
    assert holder(store).run_id == "other"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"expires": "soon", "pid": 1}', b"\xff"])
def test_an_unreadable_lease_is_none(store, content):
    store.write_bytes("_lease.json", content)
    assert holder(store) is None
    Lease(store, "mine").acquire(pytest.fail)


def test_a_thread_renews_the_lease_until_it_is_released(store, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    before = holder(store).expires
    eventually(lambda: holder(store).expires != before)
    assert not lease.lost
    lease.release()
    time.sleep(0.2)
    assert holder(store) is None


def test_releasing_leaves_the_lease_of_the_run_that_took_over(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    leave_lease(store)
    lease.release()
    assert holder(store).run_id == "other"


# --- two at once, and stores that do not answer ---------------------------------------------------


def eventually(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stale", [False, True])
def test_of_runs_that_start_at_the_same_moment_one_holds_the_lease(store, stale, monkeypatch):
    """All find it free before any of them writes; each holds it in turn, and never two at once."""
    monkeypatch.setattr(lease_module, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "_SETTLE_SECONDS", 0.2)
    if stale:
        leave_lease(store, expires=time.time() - 1)
    count = 3
    together, holding, most, served = threading.Barrier(count), [], [], []
    read = lease_module._read

    def read_together(store: Store) -> dict | None:
        entry = read(store)
        if threading.current_thread().name.startswith("run") and not getattr(ready, "met", False):
            ready.met = True
            together.wait(timeout=20)
        return entry

    ready = threading.local()
    monkeypatch.setattr(lease_module, "_read", read_together)

    def run(name: str) -> None:
        lease = Lease(Store(store.uri), name)
        lease.acquire(lambda message: None)
        holding.append(name)
        most.append(len(holding))
        time.sleep(0.3)
        assert not lease.lost
        holding.remove(name)
        served.append(name)
        lease.release()

    threads = [threading.Thread(target=run, args=(f"r{n}",), name=f"run{n}") for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(served) == ["r0", "r1", "r2"] and most == [1, 1, 1]


def test_a_lease_that_another_run_took_over_is_lost(store, monkeypatch):
    """As when this process was stopped for longer than its lease lasts."""
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert not lease.lost
    leave_lease(store)
    eventually(lambda: lease.lost)
    lease.release()
    assert holder(store).run_id == "other", "it is left to its holder"


def test_a_lease_that_vanished_is_written_again(store, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    store.delete("_lease.json")
    eventually(lambda: holder(store) is not None)
    assert holder(store).run_id == "mine" and not lease.lost
    lease.release()


def test_a_store_that_does_not_answer_is_not_a_free_output(tmp_path, monkeypatch):
    store = Store(str(tmp_path), retry_seconds=0)
    leave_lease(store)

    def silent(self, relative: str) -> bytes:
        raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(Store, "read_bytes", silent)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Lease(store, "mine").acquire(pytest.fail)
    assert holder(store) is None, "for those who only want to tell a user"


def test_a_store_that_fails_for_a_while_costs_no_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "_RENEW_RETRY_SECONDS", 0.0)
    store = Store(str(tmp_path))
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    before, write, failed = holder(store).expires, Store.write_bytes, []

    def refuse(self, relative: str, data: bytes) -> None:
        failed.append(relative)
        raise OSError("no")

    monkeypatch.setattr(Store, "write_bytes", refuse)
    eventually(lambda: len(failed) > 2)
    monkeypatch.setattr(Store, "write_bytes", write)
    eventually(lambda: holder(store).expires != before)
    assert not lease.lost
    lease.release()


def test_every_lease_is_as_long_so_that_none_is_read_in_part(store):
    """An object is read in two requests, its size first: one that grew in between would be cut short."""
    sizes = set()
    for name in ("a", "a-much-longer-name"):
        lease = Lease(store, name)
        lease.acquire(pytest.fail)
        sizes.add(store.size("_lease.json"))
        lease.release()
    assert len(sizes) == 1


def test_a_process_of_another_container_is_not_taken_for_dead(store, waits):
    """It has our host's name and a pid that means nothing here."""
    leave_lease(store, host=socket.gethostname(), pid=dead_pid(), pids="another boot pid:[1]")
    said = []
    Lease(store, "mine").acquire(said.append)
    assert len(said) == 1 and len(waits) == 3
