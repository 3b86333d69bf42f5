"""The store: whole files or none, listing, and outputs that cannot be written; and the lease on it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from ltx_ray import lease as lease_module
from ltx_ray.lease import Lease, holder
from ltx_ray.storage import Store, join, parent


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    """An empty store, on a disk and in a bucket."""
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket"))


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_paths_are_absolute_and_relative_to_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("out").path("a/b") == f"{tmp_path}/out/a/b"
    assert Store("~/out/").path() == f"{tmp_path}/out"
    assert Store(f"file://{tmp_path}/out/").path("a") == f"{tmp_path}/out/a"
    assert Store("/").path("a") == "/a"
    assert Store("out").is_local and Store(f"file://{tmp_path}").is_local


def test_write_read_exists_delete(store):
    assert not store.exists("a/b.txt")
    store.write_bytes("a/b.txt", b"one")
    store.write_bytes("a/b.txt", b"two")
    assert store.exists("a/b.txt") and store.read_bytes("a/b.txt") == b"two"
    store.delete("a/b.txt")
    store.delete("a/b.txt")
    assert not store.exists("a/b.txt")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b.txt")


def test_append(tmp_path):
    store = Store(str(tmp_path))
    store.append_text("logs/x.jsonl", "é\n")
    store.append_text("logs/x.jsonl", "2\n")
    assert store.read_bytes("logs/x.jsonl") == "é\n2\n".encode()


def test_listing(store):
    for name in ("index/b", "index/a", "index/sub/c", "other"):
        store.write_bytes(name, b"")
    assert store.list("index") == ["a", "b"]
    assert store.list("index", recursive=True) == ["a", "b", "c"]
    assert store.list("none") == []
    assert store.list("") == ["other"]


def test_publish_to_an_object_store(bucket, tmp_path):
    store = Store(f"{bucket}/out")
    (tmp_path / "x.mp4").write_bytes(b"clip")
    assert store.scratch_dir() is None
    store.publish(str(tmp_path / "x.mp4"), "clips/ab/x.mp4")
    assert store.read_bytes("clips/ab/x.mp4") == b"clip"
    assert names(tmp_path) == []


def test_publish_moves_the_finished_file(tmp_path):
    store = Store(str(tmp_path / "out"))
    scratch = Path(store.scratch_dir())
    assert scratch.is_relative_to(tmp_path / "out")
    (scratch / "x.mp4").write_bytes(b"clip")
    store.publish(str(scratch / "x.mp4"), "clips/ab/x.mp4")
    assert store.read_bytes("clips/ab/x.mp4") == b"clip"
    assert names(tmp_path) == ["out/clips/ab/x.mp4"]


@pytest.mark.parametrize("action", ["write", "publish"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, action):
    store = Store(str(tmp_path / "out"))
    store.write_bytes("x", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new")
    seen = []

    def fail(temporary, target):
        # the new content is complete beside the target before anything is replaced
        seen.append((Path(temporary).read_bytes(), Path(temporary).parent, Path(target).read_bytes()))
        raise OSError("no more")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no more"):
        store.write_bytes("x", b"new") if action == "write" else store.publish(str(source), "x")
    assert seen == [(b"new", tmp_path / "out", b"old")]
    assert names(tmp_path / "out") == ["x"]
    assert store.read_bytes("x") == b"old"


def test_a_writable_output_is_left_as_it_was(tmp_path):
    Store(str(tmp_path / "new" / "out")).check_writable()
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/ltx-ray"])
def test_an_output_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    uri = str(tmp_path / place)
    with pytest.raises(ValueError) as caught:
        Store(uri).check_writable()
    assert f"--output: {uri}, cannot be written" in str(caught.value)


def test_an_object_store_that_cannot_be_written(bucket):
    Store(f"{bucket}/out").check_writable()
    assert Store(bucket).list("", recursive=True) == []
    with pytest.raises(ValueError, match=f"--output: {bucket}none/out, cannot be written .*NO_SUCH_BUCKET"):
        Store(f"{bucket}none/out").check_writable()


def test_keys_stand_in_a_uri_as_they_are(bucket):
    Store(bucket).write_bytes("a b/100%25#é.txt", b"1")
    assert Store(f"{bucket}/a b/100%25#é.txt").read_bytes("") == b"1"
    assert Store(f"{bucket}/a b").list("") == ["100%25#é.txt"]


def test_options_of_a_uri(s3, bucket, monkeypatch):
    """Endpoint and region as pyarrow takes them, when the environment does not give them."""
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    folder = f"{bucket}/a?scheme=http&endpoint_override={endpoint}&region=us-east-1"
    assert join(folder, "b/c") == folder.replace("/a?", "/a/b/c?") and parent(join(folder, "b")) == folder
    Store(folder).write_bytes("b/c", b"1")
    assert Store(join(folder, "b/c")).read_bytes("") == b"1"
    assert s3.open_input_file(f"{bucket}/a/b/c".removeprefix("s3://")).read() == b"1"


# --- the lease -----------------------------------------------------------------------------------


def leave_lease(store: Store, **changes) -> None:
    entry = {"run_id": "other", "host": "elsewhere", "pid": 1, "expires": time.time() + 60, **changes}
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
        slept.append(seconds)
        assert len(slept) <= 3, "waits for ever"
        if len(slept) == 3:
            leave_lease(store, expires=time.time() - 1)

    monkeypatch.setattr(lease_module.time, "sleep", sleep)
    return slept


def test_a_free_output_is_taken_and_given_back(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    assert holder(store)["run_id"] == "mine"
    assert holder(store)["pid"] == os.getpid()
    lease.release()
    assert holder(store) is None
    assert not store.exists("_lease.json")


def test_a_run_waits_for_another_and_says_so_once(store, waits):
    leave_lease(store)
    said = []
    Lease(store, "mine").acquire(said.append)
    assert len(waits) == 3
    assert len(said) == 1 and "in use by run other on elsewhere" in said[0]
    assert holder(store)["run_id"] == "mine"


@pytest.mark.parametrize("stale", ["expired", "own", "dead"])
def test_a_stale_lease_is_taken_over(store, stale):
    changes = {
        "expired": {"expires": time.time() - 1},
        "own": {"run_id": "mine"},
        "dead": {"host": socket.gethostname(), "pid": dead_pid()},
    }[stale]
    leave_lease(store, **changes)
    Lease(store, "mine").acquire(pytest.fail)
    assert holder(store)["run_id"] == "mine"


def test_a_live_run_on_this_machine_holds_its_lease(store):
    leave_lease(store, host=socket.gethostname(), pid=os.getpid())
    assert holder(store)["run_id"] == "other"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"expires": "soon", "pid": 1}', b"\xff"])
def test_an_unreadable_lease_is_none(store, content):
    store.write_bytes("_lease.json", content)
    assert holder(store) is None
    Lease(store, "mine").acquire(pytest.fail)


def test_a_thread_renews_the_lease_until_it_is_released(store, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    before = holder(store)["expires"]
    end = time.monotonic() + 5
    while holder(store)["expires"] == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    lease.release()
    time.sleep(0.2)
    assert holder(store) is None


def test_releasing_leaves_the_lease_of_the_run_that_took_over(store):
    lease = Lease(store, "mine")
    lease.acquire(pytest.fail)
    leave_lease(store)
    lease.release()
    assert holder(store)["run_id"] == "other"
