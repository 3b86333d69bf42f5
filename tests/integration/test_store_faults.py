"""Stores that fail over HTTP (throttling, 500s, cut connections, silence), and the objects left afterwards."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ltx_ray.cli.app import app
from ltx_ray.cli.verify import verify
from ltx_ray.dataset.existing import list_existing
from ltx_ray.manifest.reader import read_manifest
from ltx_ray.storage import store
from ltx_ray.storage.checksums import SHA256
from ltx_ray.storage.images import read_image
from ltx_ray.storage.lease import Lease, holder
from ltx_ray.storage.retry import StoreUnavailable
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import build
from tests.support.s3_faults import Proxy

TRANSIENT = ("slow_down", "error", "cut_request", "cut_response", "lost_response")
#: More than one part of an upload (pyarrow's are 10 MB, S3's least is 5).
LARGE = os.urandom(2**20) * 12


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy that the environment names as the endpoint. It injects no fault until a test asks for some."""
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def single_try(request, monkeypatch):
    """pyarrow tries a request once, so that only the store's own retries are tested, and silence is soon noticed."""
    monkeypatch.setattr(store, "_REQUEST_TRIES", 1)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(store, "_SILENCE_SECONDS", 1.0 if parameters.get("kind") == "stall" else 120.0)


def quick_store(uri: str, retry_seconds: float = 600.0) -> Store:
    return Store(uri, retry_seconds, wait=lambda seconds: time.sleep(seconds / 20))


def objects(s3: pafs.S3FileSystem, bucket: str) -> dict[str, int]:
    """Sizes of the objects in the bucket, listed without the proxy."""
    root = bucket.removeprefix("s3://")
    infos = s3.get_file_info(pafs.FileSelector(root, recursive=True))
    return {i.path.removeprefix(f"{root}/"): i.size for i in infos if i.type == pafs.FileType.File}


def read(s3: pafs.S3FileSystem, bucket: str, name: str) -> bytes:
    with s3.open_input_file(f"{bucket}/{name}".removeprefix("s3://")) as file:
        return file.read()


def put(s3: pafs.S3FileSystem, bucket: str, name: str, data: bytes) -> None:
    with s3.open_output_stream(f"{bucket}/{name}".removeprefix("s3://")) as file:
        file.write(data)


@pytest.mark.parametrize("kind", [*TRANSIENT, "stall"])
def test_every_operation_survives_transient_faults(proxy, single_try, s3, bucket, tmp_path, kind):
    """Each operation meets the fault in its first three requests."""
    store = quick_store(bucket)
    put(s3, bucket, "d/old", b"old")

    def write() -> None:
        store.write_bytes("d/new", b"new")
        assert read(s3, bucket, "d/new") == b"new"

    def create() -> None:
        assert store.create("d/clip", b"clip")
        assert read(s3, bucket, "d/clip") == b"clip"

    def move() -> None:
        store.move("d/clip", "d/moved")
        assert read(s3, bucket, "d/moved") == b"clip" and "d/clip" not in objects(s3, bucket)

    def delete() -> None:
        store.delete("d/moved")
        assert "d/moved" not in objects(s3, bucket)

    def missing() -> None:
        with pytest.raises(FileNotFoundError):
            store.read_bytes("d/none")

    checks = {
        "read": lambda: store.read_bytes("d/old") == b"old" or pytest.fail("read"),
        "exists": lambda: store.exists("d/old") or pytest.fail("exists"),
        "not there": lambda: not store.exists("d/none") or pytest.fail("not there"),
        "list": lambda: store.list_names("d") == ["old"] or pytest.fail("list"),
        "write": write,
        "create": create,
        "move": move,
        "delete": delete,
        "missing": missing,
        "through fs": lambda: store.fs.open_input_file(store.path("d/old")).read() == b"old" or pytest.fail("fs"),
    }
    if kind == "stall":  # each stalled request takes seconds
        checks = {name: checks[name] for name in ("read", "list", "write")}
    for name, check in checks.items():
        with proxy.misbehaving(kinds=(kind,), first=3 if kind != "stall" else 1, seconds=30) as faults:
            check()
        # Faults are counted, not retries: curl itself repeats a request once if its connection was closed before it.
        met = sum(count for (_, met), count in faults.met.items() if met == kind)
        assert met == (1 if kind == "stall" else 3), name
    assert {"d/old": 3, "d/new": 3}.items() == objects(s3, bucket).items()


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_fails_half_of_the_time_loses_nothing(proxy, single_try, s3, bucket, tmp_path, seed):
    store = quick_store(bucket)
    contents = {f"x{n}": os.urandom(n * 1000) for n in range(12)}
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.5, seed=seed) as faults:
        for n, (name, data) in enumerate(contents.items()):
            if n % 2:
                assert store.create(name, data)
            else:
                store.write_bytes(name, data)
        assert store.list_names("") == sorted(contents)
        assert {name: store.read_bytes(name) for name in contents} == contents
        for name in list(contents)[:4]:
            store.delete(name)
    assert sum(count for (_, kind), count in faults.met.items() if kind != "ok") > 10
    assert objects(s3, bucket) == {name: len(data) for name, data in list(contents.items())[4:]}


@pytest.mark.parametrize("kind", ["slow_down", "cut_request", "lost_response"])
@pytest.mark.parametrize("pattern", ["partNumber=1", "partNumber=2", "uploads", r"\?uploadId"])
def test_an_interrupted_large_upload_leaves_the_older_object_and_is_repeated(
    proxy, single_try, s3, bucket, kind, pattern
):
    put(s3, bucket, "clip", b"the older one")
    store = quick_store(bucket, retry_seconds=0)
    with proxy.misbehaving(kinds=(kind,), methods=("PUT", "POST"), pattern=pattern, first=10**6) as faults:
        with pytest.raises(OSError, match="writing clip failed"):
            store.write_bytes("clip", LARGE)
    assert any(met == kind for _, met in faults.met)
    whole = kind == "lost_response" and pattern == r"\?uploadId"  # completed, but the response was lost
    assert objects(s3, bucket) == {"clip": len(LARGE) if whole else 13}
    with proxy.misbehaving(kinds=(kind,), methods=("PUT", "POST"), pattern=pattern, first=2):
        quick_store(bucket).write_bytes("clip", LARGE)
    assert read(s3, bucket, "clip") == LARGE


@pytest.mark.parametrize("kind", [*TRANSIENT, "stall"])
def test_a_store_that_stays_broken_ends_in_an_error_in_time(proxy, single_try, s3, bucket, tmp_path, kind):
    store = Store(bucket, retry_seconds=1.0)
    calls = {
        "reading x": lambda: store.read_bytes("x"),
        "looking up x": lambda: store.exists("x"),
        "listing x": lambda: store.list_names("x"),
        "writing x": lambda: store.write_bytes("x", b"1"),
        "deleting x": lambda: store.delete("x"),
    }
    if kind == "stall":
        calls = {what: calls[what] for what in ("reading x", "writing x")}
    for what, call in calls.items():
        began = time.monotonic()
        with proxy.misbehaving(kinds=(kind,), first=10**6, seconds=3600):
            with pytest.raises(OSError, match=f"{bucket}: {what} failed .tried .*: .*AWS Error"):
                call()
        # Silence is noticed after one more second, or after six for an upload, and not when it ends.
        assert time.monotonic() - began < 600, what


def test_forbidden_operations_fail_at_once(proxy, bucket):
    store = Store(bucket, wait=pytest.fail)
    with proxy.misbehaving(kinds=("denied",), first=10**6):
        calls = (
            store.read_bytes,
            store.exists,
            store.list_names,
            store.delete,
            lambda name: store.write_bytes(name, b""),
        )
        for call in calls:
            with pytest.raises(OSError, match="ACCESS_DENIED"):
                call("x")
        with pytest.raises(ValueError, match=f"--output: {bucket}, cannot be written .*ACCESS_DENIED"):
            store.check_writable()


def test_pyarrow_repeats_parts_of_an_upload_by_itself(proxy, bucket):
    """pyarrow repeats one part of a large upload, where the store would repeat all of it."""
    store = Store(bucket, retry_seconds=0)
    with proxy.misbehaving(kinds=("slow_down",), methods=("PUT",), pattern="partNumber=2", first=2) as faults:
        store.write_bytes("clip", LARGE)
    assert faults.met["PUT", "ok"] == 2 and faults.met["PUT", "slow_down"] == 2


def test_a_small_object_is_one_request(proxy, bucket):
    store = Store(bucket)
    with proxy.misbehaving() as faults:
        store.write_bytes("index/part", b"x" * 30_000)
    assert faults.met == {("PUT", "ok"): 1}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_manifest_is_read_through_faults(proxy, single_try, s3, bucket, tmp_path, form, monkeypatch):
    monkeypatch.setattr(store, "RETRY_SECONDS", 600.0)
    rows = 30_000
    if form == "jsonl":
        data = "".join(f'{{"prompt": "row {n} {"x" * 60}"}}\n' for n in range(rows)).encode()
    else:
        pq.write_table(pa.table({"prompt": [f"row {n} {'x' * 60}" for n in range(rows)]}), tmp_path / "m.parquet",
                       row_group_size=3000, use_dictionary=False, compression="none")  # fmt: skip
        data = (tmp_path / "m.parquet").read_bytes()
    put(s3, bucket, f"set/m.{form}", data)
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.3, seed=1) as faults:
        for place in (f"{bucket}/set/m.{form}", f"{bucket}/set"):
            found = [raw.values["prompt"].split()[1] for raw in read_manifest(place)]
            assert found == [str(n) for n in range(rows)]
    assert sum(count for (_, kind), count in faults.met.items() if kind != "ok") > 3
    assert faults.met.total() < 120, "read in large pieces: a request costs as much as a megabyte"


def test_an_image_is_read_through_faults(proxy, single_try, s3, bucket):
    data = os.urandom(3_000_000)
    put(s3, bucket, "img/a.png", data)
    with proxy.misbehaving(kinds=TRANSIENT, first=4, probability=0.3, seed=2):
        assert read_image(f"{bucket}/img/a.png") == data


def test_a_dataset_is_listed_repaired_and_verified_through_faults(proxy, single_try, bucket):
    store = quick_store(bucket)
    messages: list[str] = []
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.3, seed=3) as faults:
        build(store)
        store.move("index/" + store.list_names("index")[0], "index/part-renamed.parquet")
        assert list_existing(store).row_count == 4
        assert verify(bucket, messages.append, repair=True) == 1 and "4 of its rows stay" in messages[0]
        assert verify(bucket, messages.append) == 0 and list_existing(store).row_count == 4, messages
    assert sum(count for (_, kind), count in faults.met.items() if kind != "ok") > 20


def test_a_report_is_written_through_faults(proxy, single_try, bucket):
    store = build(quick_store(bucket))
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.2, seed=6):
        result = CliRunner().invoke(app, ["report", bucket])
    assert (result.exit_code, result.output) == (0, f"{bucket}/report.html\n")
    page = store.read_bytes("report.html").decode()
    assert "4 rows of 3 clips rendered, none failed" in page and "cannot be read: s3" not in page


def test_an_endpoint_without_a_server_is_reported_before_the_run(bucket):
    place = "s3://b/out?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    with pytest.raises(ValueError, match=r"cannot be written .*s3://b/out: writing _probe-.* failed .*NETWORK_CONN"):
        Store(place, retry_seconds=0).check_writable()


def test_a_lease_is_taken_and_renewed_through_faults(proxy, single_try, bucket, monkeypatch):
    monkeypatch.setattr("ltx_ray.storage.lease._RENEW_SECONDS", 0.1)
    store = quick_store(bucket)
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.3, seed=4):
        lease = Lease(store, "mine")
        lease.acquire(pytest.fail)
        time.sleep(1.5)
        assert holder(store).run_id == "mine" and not lease.lost
    lease.release()
    assert holder(store) is None


@pytest.mark.parametrize("kind", [*TRANSIENT, "stall"])
def test_conditional_writes_survive_transient_faults(proxy, single_try, s3, bucket, kind):
    """An answer that is lost is settled by what is there: the write was this call's, and is not repeated."""
    times = 3 if kind != "stall" else 1
    store = quick_store(bucket)

    def create() -> None:
        assert store.create("d/new", b"new") and read(s3, bucket, "d/new") == b"new"

    def create_again() -> None:
        assert not store.create("d/new", b"other") and read(s3, bucket, "d/new") == b"new"

    def update() -> None:
        _, version = store.read_versioned("d/new")
        assert store.update("d/new", b"newer", version) and read(s3, bucket, "d/new") == b"newer"
        assert not store.update("d/new", b"newest", version) and read(s3, bucket, "d/new") == b"newer"

    def names() -> None:
        assert list(store.names("d")) == ["new"] and list(store.names("none")) == []

    def delete() -> None:
        store.delete_many(["d/new", "d/none"])
        assert "d/new" not in objects(s3, bucket)

    for check in (create, create_again, update, names, delete):
        with proxy.misbehaving(kinds=(kind,), first=times, seconds=30) as faults:
            check()
        assert sum(count for (_, met), count in faults.met.items() if met == kind) == times, check.__name__


@pytest.mark.parametrize("seed", range(4))
def test_of_writers_whose_answers_are_lost_one_knows_that_it_wrote(proxy, single_try, s3, bucket, seed):
    stores = [quick_store(bucket) for _ in range(3)]
    with proxy.misbehaving(kinds=TRANSIENT, probability=0.4, seed=seed), ThreadPoolExecutor(3) as threads:
        for n in range(6):
            created = list(threads.map(lambda k, n=n: stores[k].create(f"{n}", b"by %d" % k), range(3)))
            (winner,) = [k for k, won in enumerate(created) if won]
            assert read(s3, bucket, f"{n}") == b"by %d" % winner
            _, version = stores[0].read_versioned(f"{n}")
            updated = list(
                threads.map(lambda k, n=n, v=version: stores[k].update(f"{n}", b"again %d" % k, v), range(3))
            )
            (winner,) = [k for k, won in enumerate(updated) if won]
            assert read(s3, bucket, f"{n}") == b"again %d" % winner


def test_a_long_listing_goes_on_where_it_was_interrupted(proxy, single_try, s3, bucket):
    from boto3.session import Session

    client = Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    expected = [f"{n:04d}" for n in range(2500)]
    for name in expected:
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"d/{name}", Body=b"1")
    store = quick_store(bucket)
    with proxy.misbehaving(kinds=TRANSIENT, methods=("GET",), probability=0.5, seed=1) as faults:
        assert list(store.names("d")) == expected
    assert sum(count for (_, kind), count in faults.met.items() if kind != "ok") > 1
    with proxy.misbehaving() as faults:
        assert len(list(store.names("d"))) == 2500
        store.delete_many(f"d/{name}" for name in expected)
    assert faults.met == {("GET", "ok"): 3, ("POST", "ok"): 3} and objects(s3, bucket) == {}


def test_conditional_writes_that_are_forbidden_or_stay_broken_say_so(proxy, single_try, bucket):
    store = Store(bucket, wait=pytest.fail)
    calls = {
        "creating x": lambda store: store.create("x", b"1"),
        "writing x": lambda store: store.update("x", b"1", '{"e_tag": "1"}'),
        "reading x": lambda store: store.read_versioned("x"),
        "listing x": lambda store: list(store.names("x")),
        "deleting x": lambda store: store.delete_many(["x"]),
    }
    with proxy.misbehaving(kinds=("denied",), first=10**6):
        for call in calls.values():
            with pytest.raises(PermissionError, match=r"^AccessDenied: injected \(HTTP status 403\)$"):
                call(store)
    for kind, told in {"slow_down": "SlowDown: injected", "lost_response": "HTTP error: error sending request"}.items():
        with proxy.misbehaving(kinds=(kind,), first=10**6):
            for what, call in calls.items():
                with pytest.raises(StoreUnavailable, match=rf"^{bucket}: {what} failed \(tried once\): {told}"):
                    call(Store(bucket, retry_seconds=0))
    for call in (calls["creating x"], calls["listing x"]):
        with pytest.raises(OSError, match=r"^NoSuchBucket: The specified bucket .* \(HTTP status 404\)$"):
            call(Store(f"{bucket}none", wait=pytest.fail))


def test_conditional_writes_are_one_request_each(proxy, bucket):
    store = Store(bucket)
    with proxy.misbehaving() as faults:
        assert store.create("x", b"1") and not store.create("x", b"2")
        assert store.update("x", b"3", store.read_versioned("x")[1])
    assert faults.met == {("PUT", "ok"): 3, ("GET", "ok"): 1}


def test_a_conditional_write_that_meets_another_one_is_tried_again(proxy, bucket):
    store = quick_store(bucket)
    with proxy.misbehaving(kinds=("conflict",), methods=("PUT",), first=2):
        assert store.create("x", b"1")
    with proxy.misbehaving(kinds=("conflict",), methods=("PUT",), first=2):
        assert not store.create("x", b"1"), "the object is another call's, with the same bytes"
    _, version = store.read_versioned("x")
    with proxy.misbehaving(kinds=("conflict",), methods=("PUT",), first=2):
        assert store.update("x", b"2", version) and store.read_bytes("x") == b"2"


def test_a_store_that_overlooks_conditions_is_known(proxy, bucket):
    with proxy.misbehaving(kinds=("unconditional",), first=10**6):
        assert not Store(bucket).refuses_second_create()
    assert Store(bucket).refuses_second_create()


def test_a_store_that_has_no_conditions_looks_before_it_writes(proxy, bucket):
    store = Store(bucket, wait=pytest.fail)
    with proxy.misbehaving(kinds=("not_implemented",), first=10**6):
        assert not store.refuses_second_create()
        assert [store.create("x", data) for data in (b"one", b"two")] == [True, False]
        _, version = store.read_versioned("x")
        assert [store.update("x", data, version) for data in (b"three", b"four")] == [True, False]
        assert store.read_bytes("x") == b"three" and not store.update("none", b"1", version)
        lease = Lease(store, "mine")
        lease.acquire(pytest.fail)
        assert holder(store).run_id == "mine"
        lease.release()


def test_a_store_that_takes_no_checksums_gets_none(proxy, bucket):
    """One try in all, since each file after the first is written without."""
    store = Store(bucket, wait=pytest.fail)
    with proxy.misbehaving(kinds=("no_checksums",), first=10**6):
        assert [store.create("x", data) for data in (b"one", b"two")] == [True, False]
        assert store.update("x", b"three", store.read_versioned("x")[1])
        assert store.read_bytes("x") == b"three" and store.stored_checksums("x") == {}
    summed = [path for _, path, headers in proxy.requests if "x-amz-checksum-sha256" in map(str.lower, headers)]
    assert len(summed) == 1
    assert Store(bucket).create("y", b"one")
    assert Store(bucket).stored_checksums("y")[SHA256] == hashlib.sha256(b"one").hexdigest()


def test_checksums_are_asked_for_again_when_that_fails(proxy, bucket):
    store = quick_store(bucket)
    store.create("x", b"one")
    with proxy.misbehaving(kinds=("slow_down", "cut_request", "lost_response"), methods=("HEAD",), first=3):
        assert store.stored_checksums("x")[SHA256] == hashlib.sha256(b"one").hexdigest()
    with pytest.raises(FileNotFoundError):
        store.stored_checksums("none")
    with proxy.misbehaving(kinds=("denied",), first=10**6), pytest.raises(PermissionError):
        store.stored_checksums("x")


def test_many_threads_share_a_store_that_throttles(proxy, single_try, s3, bucket):
    store, errors = quick_store(bucket), []

    def write_and_read(n: int) -> None:
        try:
            for m in range(6):
                store.write_bytes(f"t/{n}-{m}", f"{n} {m}".encode())
                assert store.read_bytes(f"t/{n}-{m}") == f"{n} {m}".encode()
        except BaseException as error:
            errors.append(error)

    with proxy.misbehaving(kinds=("slow_down",), probability=0.4, seed=5):
        threads = [threading.Thread(target=write_and_read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
    assert not errors and len(objects(s3, bucket)) == 48
