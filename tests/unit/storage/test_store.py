"""The store: whole files or none, listing, retries, and outputs that cannot be written."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from ltx_ray.storage import local_files
from ltx_ray.storage.locations import join, parent
from ltx_ray.storage.retry import RetryPolicy, is_permanent
from ltx_ray.storage.store import Store, clean_stale


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
    assert store.list_names("index") == ["a", "b"]
    assert store.list_names("index", recursive=True) == ["a", "b", "c"]
    assert store.list_names("none") == []
    assert store.list_names("") == ["other"]


def test_temporary_files_are_on_the_outputs_disk(tmp_path, bucket):
    assert Path(Store(str(tmp_path / "out")).scratch_dir()).is_relative_to(tmp_path / "out")
    assert Store(f"{bucket}/out").scratch_dir() is None


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "out"), retry_seconds=0)
    store.write_bytes("x", b"old")
    seen = []

    def fail(temporary, target):
        # The new content is complete in a file beside the target before the target is replaced.
        seen.append((Path(temporary).read_bytes(), Path(temporary).parent, Path(target).read_bytes()))
        raise OSError("no more")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no more"):
        store.write_bytes("x", b"new")
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


def test_an_output_on_a_full_disk_cannot_be_written(tmp_path, monkeypatch):
    """A full disk has names left, and no room for bytes."""

    def fsync(handle: int) -> None:
        if os.fstat(handle).st_size and stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=r"--output: .*, cannot be written .*No space left"):
        Store(str(tmp_path), 0.1).check_writable()
    assert names(tmp_path) == []


def test_an_object_store_that_cannot_be_written(bucket):
    Store(f"{bucket}/out").check_writable()
    assert Store(bucket).list_names("", recursive=True) == []
    with pytest.raises(ValueError, match=f"--output: {bucket}none/out, cannot be written .*NO_SUCH_BUCKET"):
        Store(f"{bucket}none/out").check_writable()


def test_keys_in_a_uri_are_not_percent_decoded(bucket):
    Store(bucket).write_bytes("a b/100%25#é.txt", b"1")
    assert Store(f"{bucket}/a b/100%25#é.txt").read_bytes("") == b"1"
    assert Store(f"{bucket}/a b").list_names("") == ["100%25#é.txt"]


def test_options_of_a_uri(s3, bucket, monkeypatch):
    """A URI may give endpoint and region as pyarrow's options when the environment does not."""
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    folder = f"{bucket}/a?scheme=http&endpoint_override={endpoint}&region=us-east-1"
    assert join(folder, "b/c") == folder.replace("/a?", "/a/b/c?") and parent(join(folder, "b")) == folder
    Store(folder).write_bytes("b/c", b"1")
    assert Store(join(folder, "b/c")).read_bytes("") == b"1"
    assert s3.open_input_file(f"{bucket}/a/b/c".removeprefix("s3://")).read() == b"1"


# --- what killed processes leave -----------------------------------------------------------------


def leave(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_old_temporaries_are_removed_and_nothing_else(tmp_path):
    store = Store(str(tmp_path))
    old = ["_tmp/tmpab.mp4", "_tmp/x.safetensors", "clips/ab/.x.mp4.0123abcd", "index/.part-1.parquet.ffffffff",
           ".run.json.00000000", "runs/1/.run.json.00000000"]  # fmt: skip
    others = ["clips/ab/x.mp4", "index/.hidden", ".x.0123ABCD", "_lease.json", "clips/ab/.x.mp4.0123abc"]
    for name in [*old, *others]:
        leave(tmp_path / name, age=1000)
    leave(tmp_path / "_tmp/young.mp4", age=10)
    assert clean_stale(store, older_than_seconds=500) == len(old)
    assert names(tmp_path) == sorted([*others, "_tmp/young.mp4"])
    store.remove_scratch()
    assert (tmp_path / "_tmp").exists(), "a file is still in it"
    assert clean_stale(store, older_than_seconds=0) == 1
    store.remove_scratch()
    assert not (tmp_path / "_tmp").exists()
    store.remove_scratch()


def test_an_object_store_has_no_temporaries(bucket):
    store = Store(bucket)
    store.write_bytes("clips/ab/.x.mp4.0123abcd", b"a user's")
    assert clean_stale(store, 0) == 0
    store.remove_scratch()
    assert store.exists("clips/ab/.x.mp4.0123abcd")


# --- moving, sizes -------------------------------------------------------------------------------


def test_move_folders_and_sizes(store):
    store.write_bytes("index/a", b"123")
    store.write_bytes("index/sub/x", b"1")
    store.move("index/a", "index/_b")
    assert store.sizes("index") == {"_b": 3} and store.folders("index") == ["sub"]
    assert store.size("index/_b") == 3 and store.size("index/a") is None and store.size("index") is None
    assert store.sizes("none") == {} and store.folders("none") == []
    with pytest.raises(FileNotFoundError):
        store.move("index/none", "index/c")


# --- retries -------------------------------------------------------------------------------------


class Clock:
    """A clock that only waits advance. It records them."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def failing(times: int, error: OSError | None = None):
    """A function that fails `times` times and then returns how often it was called."""
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error or OSError("AWS Error SLOW_DOWN during GetObject operation")
        return len(calls)

    return call


def test_transient_errors_are_retried_with_growing_waits(clock):
    assert RetryPolicy("s3://b", 60, clock, clock.wait)("reading", "x", failing(8)) == 9
    assert len(clock.waits) == 8
    for n, waited in enumerate(clock.waits):
        longest = min(0.25 * 2**n, 10.0)
        assert longest / 2 <= waited <= longest
    assert len(set(clock.waits)) == 8, "without jitter, throttled workers come back together"


def test_retries_end_in_an_error_that_says_what_was_tried(clock):
    with pytest.raises(OSError) as caught:
        RetryPolicy("s3://b/out", 30, clock, clock.wait)("writing", "index/x", failing(10**6))
    assert clock.now == pytest.approx(30), "the last try is at the end of the time, not after it"
    tries = len(clock.waits) + 1
    assert str(caught.value) == (
        f"s3://b/out: writing index/x failed (tried {tries} times in 30 s): "
        "AWS Error SLOW_DOWN during GetObject operation"
    )


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.ENOTDIR, "x"),
        OSError("When reading: AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("When uploading: AWS Error NO_SUCH_BUCKET during PutObject operation"),
        OSError("When reading: AWS Error UNKNOWN (HTTP status 400) during HeadObject operation"),
        OSError("Bucket 'b' not found"),
    ],
)
def test_permanent_errors_are_raised_at_once(clock, error):
    assert is_permanent(error)
    with pytest.raises(OSError) as caught:
        RetryPolicy("s3://b", 60, clock, clock.wait)("reading", "x", failing(1, error))
    assert caught.value is error and not clock.waits


def test_a_folder_in_a_files_place_is_said_at_once(tmp_path, clock):
    with pytest.raises(OSError, match=f"'{tmp_path}' is a directory"):
        Store(str(tmp_path), clock=clock, wait=clock.wait).read_bytes("")
    assert not clock.waits


def test_an_option_that_no_store_has_is_refused_by_the_name_of_the_store():
    with pytest.raises(ValueError, match=r"^s3://b/x: cannot be opened \(.*'sig'\)"):
        Store("s3://b/x?sig=verySecret1")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EIO, "x"),
        OSError(errno.ESTALE, "x"),
        ConnectionResetError(errno.ECONNRESET, "x"),
        TimeoutError(errno.ETIMEDOUT, "x"),
        OSError("When reading: AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
        OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached"),
        OSError("AWS Error INTERNAL_FAILURE during ListObjectsV2 operation"),
    ],
)
def test_other_errors_are_transient(error):
    assert not is_permanent(error)


def test_writing_to_a_full_disk_is_retried_and_leaves_no_partial_file(tmp_path, clock, monkeypatch):
    store = Store(str(tmp_path / "out"), retry_seconds=60, clock=clock, wait=clock.wait)
    store.append_text("log", "one\n")
    store.write_bytes("x", b"old")
    full, real, current = [3], os.fsync, b"old"

    def fsync(handle: int) -> None:
        if full[0]:
            full[0] -= 1
            assert store.read_bytes("x") == current
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store.write_bytes("x", b"new")
    assert store.read_bytes("x") == b"new" and len(clock.waits) == 3
    full[0], current = 2, b"new"
    assert store.create("clips/y", b"clip")
    assert store.read_bytes("clips/y") == b"clip" and len(clock.waits) == 5
    assert names(tmp_path) == ["out/clips/y", "out/log", "out/x"]
    full[0] = 10**6
    with pytest.raises(OSError, match=r"/out: writing x failed \(tried \d+ times in 60 s\): .*No space left"):
        store.write_bytes("x", b"newer")
    assert store.read_bytes("x") == b"new" and names(tmp_path) == ["out/clips/y", "out/log", "out/x"]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_line_that_a_full_disk_cut_is_not_written_twice(tmp_path, clock, recovers):
    """A limit on the file's size imitates a full disk, since /dev/full cannot be truncated."""
    import resource
    import signal

    store = Store(str(tmp_path), retry_seconds=5, clock=clock, wait=clock.wait)
    store.append_text("log", "one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sizes = []

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        sizes.append(store.size("log"))
        if recovers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    store = Store(str(tmp_path), retry_seconds=5, clock=clock, wait=wait)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
        if recovers:
            store.append_text("log", "two\n")
        else:
            with pytest.raises(OSError, match="writing log failed"):
                store.append_text("log", "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert set(sizes) == {4}, "a partial write is truncated before the next try"
    assert store.read_bytes("log") == (b"one\ntwo\n" if recovers else b"one\n")


def test_a_written_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    store, order = Store(str(tmp_path / "out")), []
    store.write_bytes("x", b"0")  # makes the folder
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        order.append(("sync", os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def record_replace(source, target) -> None:
        order.append(("name", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    store.write_bytes("x", b"1")
    store.write_bytes("y", b"clip")
    x, y = (os.stat(store.path(name)).st_ino for name in ("x", "y"))
    assert order == [("sync", x, 1), ("name", x, 1), ("sync", y, 4), ("name", y, 4)]


def test_a_read_only_disk_is_said_of_the_file_and_not_of_a_temporary_one(tmp_path, monkeypatch):
    store = Store(str(tmp_path), retry_seconds=0)
    store.write_bytes("old", b"x")
    _, version = store.read_versioned("old")

    def refuse(path, mode):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(local_files, "open", refuse, raising=False)
    for write in (
        lambda: store.write_bytes("new", b"x"), lambda: store.create("new", b"x"),
        lambda: store.update("old", b"y", version),
    ):  # fmt: skip
        with pytest.raises(OSError, match=r"Read-only file system: '.*/(new|old)'"):
            write()
