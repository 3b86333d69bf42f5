"""Requests to object stores are counted once each, by kind and outcome."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.pools.worker import RankActor
from ltx_ray.storage.requests import REQUESTS
from ltx_ray.storage.retry import RetryPolicy, StoreUnavailable
from ltx_ray.storage.store import Store


@pytest.fixture(autouse=True)
def nothing_before():
    REQUESTS.take()
    yield
    REQUESTS.take()


def counted() -> dict[tuple[str, str], int]:
    return {(kind, outcome): number for kind, outcome, number in REQUESTS.take()}


def failing(errors: list[Exception]) -> Callable[[], str]:
    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return call


def test_by_pyarrow_and_by_obstore(bucket):
    store = Store(bucket)
    REQUESTS.take()
    store.write_bytes("a", b"a")
    assert counted() == {("writing", "ok"): 1}
    assert store.create("b", b"b") and not store.create("b", b"c")
    assert counted() == {("creating", "ok"): 2}, "that another was first is an answer"
    assert store.exists("a") and store.read_bytes("a") == b"a" and store.read_versioned("b")[0] == b"b"
    assert counted() == {("looking up", "ok"): 1, ("reading", "ok"): 2}
    with pytest.raises(FileNotFoundError):
        store.read_bytes("none")
    with pytest.raises(FileNotFoundError):
        store.read_versioned("none")
    assert counted() == {("reading", "missing"): 2}
    store.delete("a")
    assert store.fs.open_input_file(store.path("b")).read() == b"b"
    assert counted() == {("deleting", "ok"): 1, ("opening", "ok"): 1, ("reading", "ok"): 1}
    table = io.BytesIO()
    pq.write_table(pa.table({"x": [1], "y": [2]}), table)
    store.write_bytes("t.parquet", table.getvalue())
    REQUESTS.take()
    assert store.read_columns("t.parquet", ["x"]).to_pylist() == [{"x": 1}]
    assert counted() == {("reading", "ok"): 1}


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ([OSError("SLOW_DOWN"), OSError("SLOW_DOWN")], {"error": 2, "ok": 1}),
        ([PermissionError("no")], {"refused": 1}),
        ([FileNotFoundError("none")], {"missing": 1}),
        ([OSError("AWS Error NO_SUCH_KEY")], {"missing": 1}),
        ([OSError("reset")] * 9, {"error": 4}),
        ([KeyError("a condition")], {"refused": 1}),
    ],
    ids=["throttled", "forbidden", "missing", "deleted", "given up", "another error"],
)
def test_each_try_is_counted_as_it_ended(errors, found):
    now = [0.0]
    retry = RetryPolicy("s3://b/out", 3.0, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + 1.0))
    try:
        retry("writing", "a", failing(list(errors)))
    except (OSError, KeyError) as error:
        assert "ok" not in found and isinstance(error, StoreUnavailable) == (len(errors) > 2)
    assert counted() == {("writing", outcome): number for outcome, number in found.items()}


def test_a_local_disk_is_no_store_of_requests(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a", b"a")
    assert store.create("b", b"b") and store.exists("a") and REQUESTS.take() == ()


def test_the_report_of_a_rank_has_those_since_the_last_one():
    rank = RankActor()
    REQUESTS.count("writing", "ok")
    assert rank._report(lambda: REQUESTS.count("reading", "error"))[0].requests == (
        ("writing", "ok", 1), ("reading", "error", 1)
    )  # fmt: skip
    assert rank._report(lambda: None)[0].requests == ()
