"""Files that are created once and replaced in the version that was read, on a disk and in a bucket."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ltx_ray.storage.store import Store, clean_stale


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    """An empty store, on a disk and in a bucket."""
    return Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture
def local(tmp_path) -> Store:
    return Store(str(tmp_path / "out"), retry_seconds=0)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- creating -------------------------------------------------------------------------------------


def test_a_file_is_created_once(store):
    assert [store.create("a/b", data) for data in (b"first", b"second", b"first")] == [True, False, False]
    assert store.read_bytes("a/b") == b"first" and list(store.names("")) == ["a/b"]


def test_of_many_writers_at_once_one_creates_the_file(store):
    for n in range(8):
        together = threading.Barrier(4)

        def create(data: bytes, name: str = f"{n}", together: threading.Barrier = together) -> bool:
            together.wait()
            return store.create(name, data)

        with ThreadPoolExecutor(4) as threads:
            contents = [b"%d" % k * 1000 for k in range(4)]
            (winner,) = [data for data, won in zip(contents, threads.map(create, contents), strict=True) if won]
        assert store.read_bytes(f"{n}") == winner


def test_a_created_file_and_its_name_are_on_the_disk_before_the_call_returns(local, monkeypatch):
    order: list[object] = []
    fsync, link = os.fsync, os.link

    def record_fsync(handle: int) -> None:
        order.append(os.fstat(handle).st_ino)
        fsync(handle)

    def record_link(source, target) -> None:
        link(source, target)
        order.append("name")

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    assert local.create("state/wal/x", b"1")
    root = Path(local.root)
    folders = [root.parent, root, root / "state"]  # each has got a new folder
    expected = [os.stat(folder).st_ino for folder in folders]
    assert order == [*expected, os.stat(root / "state/wal/x").st_ino, "name", os.stat(root / "state/wal").st_ino]


def test_a_link_that_was_made_although_the_disk_says_it_was_there_is_this_calls(local, monkeypatch):
    """NFS repeats a request whose response was lost, and then finds its own link."""
    link = os.link

    def twice(source, target) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert local.create("x", b"1") and local.read_bytes("x") == b"1" and files(Path(local.root)) == ["x"]
    assert not local.create("x", b"1"), "the file is another call's, with the same bytes"


def test_an_error_after_the_link_was_made_is_retried_and_settled(tmp_path, monkeypatch):
    store, link, calls = Store(str(tmp_path), wait=lambda seconds: None), os.link, []

    def broken(source, target) -> None:
        calls.append(target)
        link(source, target)
        if len(calls) == 1:
            raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "link", broken)
    assert store.create("x", b"1") and len(calls) == 2 and files(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_without_hard_links(local, monkeypatch, number):
    def refuse(source, target) -> None:
        raise OSError(number, "no links")

    monkeypatch.setattr(os, "link", refuse)
    assert [local.create("x", data) for data in (b"first", b"second")] == [True, False]
    assert local.read_bytes("x") == b"first" and files(Path(local.root)) == ["x"] and local.refuses_second_create()


def test_a_full_disk_leaves_nothing_of_a_file_that_was_to_be_created(local, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path(local.root).mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"out: creating x failed \(tried once\): .*No space left"):
        local.create("x", b"1")
    assert files(Path(local.root)) == []


# --- updating -------------------------------------------------------------------------------------


def test_a_file_is_replaced_in_the_version_that_was_read(store):
    store.create("x", b"one")
    data, version = store.read_versioned("x")
    assert data == b"one"
    assert store.update("x", b"two", version) and store.read_bytes("x") == b"two"
    assert not store.update("x", b"three", version) and store.read_bytes("x") == b"two"
    data, version = store.read_versioned("x")
    assert data == b"two" and store.update("x", b"three", version) and list(store.names("")) == ["x"]


def test_a_file_that_is_gone_is_not_replaced(store):
    store.create("x", b"one")
    _, version = store.read_versioned("x")
    store.delete("x")
    assert not store.update("x", b"two", version) and not store.exists("x")
    assert not store.update("none/x", b"two", version)
    with pytest.raises(FileNotFoundError):
        store.read_versioned("x")


def _count(uri: str, turns: int) -> None:
    store = Store(uri)
    while turns:
        data, version = store.read_versioned("count")
        turns -= store.update("count", b"%d" % (int(data) + 1), version)


def test_no_update_of_several_processes_is_lost(local):
    local.create("count", b"0")
    processes = [multiprocessing.get_context("fork").Process(target=_count, args=(local.uri, 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert local.read_bytes("count") == b"90" and files(Path(local.root)) == ["count"]


def test_an_error_after_a_file_was_replaced_is_retried_and_settled(tmp_path, monkeypatch):
    store, replace, calls = Store(str(tmp_path), wait=lambda seconds: None), os.replace, []
    store.create("x", b"one")
    _, version = store.read_versioned("x")

    def broken(source, target) -> None:
        calls.append(target)
        replace(source, target)
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "replace", broken)
    assert store.update("x", b"two", version) and len(calls) == 1 and store.read_bytes("x") == b"two"


def test_a_file_system_without_locks_replaces_files_all_the_same(local, monkeypatch):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    local.create("x", b"one")
    assert local.update("x", b"two", local.read_versioned("x")[1]) and local.read_bytes("x") == b"two"


def test_the_lock_of_a_killed_process_hinders_nobody(local):
    local.create("x", b"one")
    lock = Path(local.path(".x.lock"))
    lock.touch()
    assert local.update("x", b"two", local.read_versioned("x")[1]) and not lock.exists()
    lock.touch()
    os.utime(lock, (0, 0))
    assert list(local.names("")) == ["x"]
    assert clean_stale(local, older_than_seconds=60) == 1 and not lock.exists()


# --- listing, deleting, probing -------------------------------------------------------------------


def test_names_are_those_of_all_files_below_the_folder(store):
    for name in ("state/wal/a/1.rows", "state/wal/a/2.rows", "state/wal/b/1.rows", "state/walrus", "other"):
        store.create(name, b"1")
    assert sorted(store.names("state/wal")) == ["a/1.rows", "a/2.rows", "b/1.rows"]
    assert sorted(store.names("state")) == ["wal/a/1.rows", "wal/a/2.rows", "wal/b/1.rows", "walrus"]
    assert list(store.names("none")) == []
    assert len(list(store.names(""))) == 5


def test_many_files_are_deleted(store):
    for n in range(5):
        store.create(f"d/{n}", b"1")
    store.delete_many(f"d/{n}" for n in (0, 1, 9, 3))
    assert sorted(store.names("d")) == ["2", "4"]
    store.delete_many([])


def test_a_store_that_refuses_a_second_create_is_known(store):
    assert store.refuses_second_create() and store.refuses_second_create()
    assert list(store.names("")) == ["state/probe"]
