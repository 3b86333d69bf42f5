"""Folding: which rows go into which part, what a start does with a killed run's rows, and what failed/ holds."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import fold_dataset, fold_output
from ltx_ray.dataset.identity import dataset_id, read_identity
from ltx_ray.dataset.parts import encode_segment, list_segments, read_segment
from ltx_ray.dataset.row_log import FOLD_SECONDS
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.manifest.reader import RawRow, read_manifest
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, boxes, build, clip_of, rows_of
from tests.support.datasets import dataset_writer, finish, row_log, rows_in
from tests.support.results import CRASH, ITEM, NAN, OTHER, RENDERED
from tests.support.samples import request


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))


def add(writer: DatasetWriter, *numbers: int) -> None:
    for n in numbers:
        writer.write_index(f"{n:032x}", request(id=f"r{n}"), RENDERED)


def parts(store: Store, folder: str = "index") -> dict[str, list[str]]:
    """Ids by the number of their part."""
    return {
        name[14:22]: pq.read_table(pa.BufferReader(store.read_bytes(f"{folder}/{name}")))["id"].to_pylist()
        for name in store.list_names(folder)
    }


def test_rows_are_sorted_and_parts_are_numbered_on(store):
    writer = dataset_writer(store)
    add(writer, 3, 1, 2)
    finish(writer)
    add(writer, 0)
    finish(writer)
    assert parts(store) == {"00000000": ["r1", "r2", "r3"], "00000001": ["r0"]}
    assert {name[5:13] for name in store.list_names("index")} == {read_identity(store).id} == {dataset_id(store)}
    assert not list(store.names("state/wal"))


def test_many_rows_fill_several_parts_and_none_is_small(store):
    writer = dataset_writer(store, part_rows=4)
    add(writer, *range(10))
    finish(writer)
    assert sorted(map(len, parts(store).values())) == [5, 5]


def test_a_hole_stays_a_hole(store):
    writer = dataset_writer(store)
    for n in range(3):
        add(writer, n)
        finish(writer)
    store.delete(f"index/{store.list_names('index')[1]}")
    again = dataset_writer(store, "again")
    add(again, 3)
    finish(again)
    assert sorted(parts(store)) == ["00000000", "00000002", "00000003"]


def test_a_fold_is_due_when_rows_are_many_or_old(tmp_path):
    now = [0.0]
    log = row_log(Store(str(tmp_path)), part_rows=3, clock=lambda: now[0])
    writer = DatasetWriter(log)
    add(writer, 1, 2)
    assert not log.fold_is_due
    log.commit()
    assert not log.fold_is_due
    now[0] = FOLD_SECONDS
    assert log.fold_is_due
    log.fold()
    assert not log.fold_is_due
    now[0] *= 3
    assert not log.fold_is_due, "nothing waits"
    add(writer, 3, 4, 5)
    log.commit()
    assert log.fold_is_due


def test_of_two_drivers_the_slower_takes_the_next_number_without_the_rows_of_the_other(store):
    one, two = dataset_writer(store, "one"), dataset_writer(store, "two")
    add(one, 1, 2)
    add(two, 2, 3)
    one.log.commit(), two.log.commit()
    [taken] = [path for path in list_segments(store) if "/two/" in path]
    held = store.read_bytes(taken)
    one.log.close()
    store.write_bytes(taken, held)  # as if the other had not deleted it yet
    two.log.close()
    assert sorted(row["id"] for row in rows_in(store, "index")) == ["r1", "r2", "r3"]
    three = dataset_writer(store, "three")
    add(two, 4)
    add(three, 5)
    finish(three)
    finish(two)
    assert sorted(parts(store)) == ["00000000", "00000001", "00000002"]


def test_a_plain_reader_sees_no_segment(store, tmp_path):
    writer = dataset_writer(store)
    add(writer, 1)
    finish(writer)
    add(writer, 2)
    writer.log.commit()
    assert [row["id"] for row in rows_in(store, "index")] == ["r1"]
    if store.is_local:
        assert pads.dataset(store.path("index"), format="parquet").to_table()["id"].to_pylist() == ["r1"]
        assert not [name for _, _, names in os.walk(store.path("state")) for name in names if name.endswith("parquet")]


# --- what a killed run left ----------------------------------------------------------------------


def test_the_next_start_folds_what_a_killed_run_has_finished(store):
    writer = dataset_writer(store)
    add(writer, 1, 2)
    writer.write_failed(OTHER, request(id="f"), RawRow("m.jsonl", 1, {}), CRASH)
    writer.log.commit()
    said: list[str] = []
    if store.is_local:
        assert fold_output(store, said.append) == 0 and "2 rows of a run that was killed have no whole clip" in said[0]
        return
    assert fold_output(store, said.append) == 2 and not said
    assert fold_output(store, pytest.fail) == 0
    assert len(rows_in(store, "index")) == 2 and len(rows_in(store, "failed")) == 1


def test_a_fold_removes_the_empty_folders_of_runs_and_no_other(tmp_path):
    store = Store(str(tmp_path))
    writer = dataset_writer(store)
    writer.write_failed(OTHER, request(id="f"), RawRow("m.jsonl", 1, {}), CRASH)
    writer.log.commit()
    for run in ("killed", "writes"):
        (tmp_path / "state/wal" / run).mkdir()
    (tmp_path / "state/wal/writes/.00000000-index.rows.0123abcd").write_bytes(b"half")
    fold_output(store, pytest.fail)
    assert [path.name for path in (tmp_path / "state/wal").iterdir()] == ["writes"]


def test_a_row_whose_clip_is_not_whole_is_rendered_again_and_the_others_are_folded(tmp_path):
    store = build(Store(str(tmp_path)))
    [part] = store.list_names("index")
    rows = pq.read_table(store.path(f"index/{part}"))
    store.write_bytes("state/wal/killed/00000000-index.rows", encode_segment(rows, "index"))
    store.delete(f"index/{part}")
    store.write_bytes(clip_of(0), boxes(ITEMS[0])[:-1])
    said: list[str] = []
    existing = list_existing(store)
    assert existing.row_count == 4
    assert fold_dataset(store, existing, dataset_id(store), "next", said.append) == 2
    assert sorted(rows_of(store)) == [(ITEMS[1], "c"), (ITEMS[2], "d")] and existing.row_count == 2
    assert existing.pending_count == 0 and "2 rows" in said[0] and not list_segments(store)


def test_a_damaged_segment_is_set_aside_and_the_others_are_folded(store):
    store.write_bytes("state/wal/killed/00000000-failed.rows", b"no rows")
    writer = dataset_writer(store)
    writer.write_failed(ITEM, request(id="a"), RawRow("m.jsonl", 1, {}), NAN)
    writer.log.commit()
    said: list[str] = []
    fold_output(store, said.append)
    assert len(said) == 1 and "state/wal/killed/00000000-failed.rows" in said[0] and "state/aside/" in said[0]
    assert list(store.names("state/aside")) == ["state/wal/killed/00000000-failed.rows"]
    assert [row["id"] for row in rows_in(store, "failed")] == ["a"] and not list_segments(store)


# --- failed/ -------------------------------------------------------------------------------------


def fail(writer: DatasetWriter, *numbers: int, failure=CRASH) -> None:
    for n in numbers:
        writer.write_failed(f"{n:032x}", request(id=f"r{n}"), RawRow("m.jsonl", n, {}), failure)


def test_failed_is_what_is_failed_now(store):
    writer = dataset_writer(store, part_rows=4)
    fail(writer, *range(8))
    finish(writer)
    assert sorted(map(len, parts(store, "failed").values())) == [4, 4]
    again = dataset_writer(store, "again")
    add(again, 0, 1, 2, 3, 5)
    fail(again, 6, failure=NAN)
    finish(again)
    failed = {row["id"]: row["message"] for row in rows_in(store, "failed")}
    assert failed == {"r4": CRASH.message, "r6": NAN.message, "r7": CRASH.message}
    assert len(rows_in(store, "failed")) == 3
    assert {row["id"] for row in rows_in(store, "index")} == {"r0", "r1", "r2", "r3", "r5"}
    existing = list_existing(store)
    assert (existing.failed_count, existing.failed_kinds["row"]) == (3, 1)


def test_failed_does_not_change_while_a_run_reads_it(store):
    writer = dataset_writer(store)
    fail(writer, 1, 2)
    finish(writer)
    before = parts(store, "failed")
    retry = dataset_writer(store, "retry", fold_failures=False, part_rows=1)
    add(retry, 1)
    fail(retry, 2, failure=NAN)
    retry.log.commit()
    retry.log.fold()
    assert parts(store, "failed") == before and [row["id"] for row in rows_in(store, "index")] == ["r1"]
    retry.log.close()
    assert [(row["id"], row["message"]) for row in rows_in(store, "failed")] == [("r2", NAN.message)]
    assert [raw.values["id"] for raw in read_manifest(f"{store.uri}/failed")] == ["r2"]


def test_a_run_without_the_lease_leaves_failures_to_the_next(store):
    lost = dataset_writer(store, holds_lease=lambda: False)
    add(lost, 1)
    fail(lost, 2)
    finish(lost)
    assert len(rows_in(store, "index")) == 1 and not rows_in(store, "failed")
    assert [path.rpartition("-")[2] for path in list_segments(store)] == ["failed.rows"]
    fold_output(store, pytest.fail)
    assert [row["id"] for row in rows_in(store, "failed")] == ["r2"] and not list_segments(store)


def test_a_failure_that_a_crash_left_twice_is_there_once_after_the_next_fold(store):
    writer = dataset_writer(store)
    fail(writer, 1, 2)
    finish(writer)
    [name] = store.list_names("failed")
    store.write_bytes(f"failed/{layout.part_name(dataset_id(store), 7)}", store.read_bytes(f"failed/{name}"))
    finish(dataset_writer(store, "next"))
    assert sorted(row["id"] for row in rows_in(store, "failed")) == ["r1", "r2"]


def test_failures_of_parts_of_one_row_leave_when_their_rows_are_rendered(store):
    for kind, n in (("row", 1), ("infra", 2)):
        name = f"part-{kind}-{n:032x}-{layout.row_key(f'r{n}')}.parquet"
        store.write_bytes(f"failed/{name}", b"never read")
    writer = dataset_writer(store)
    add(writer, 1)
    finish(writer)
    assert [name[:11] for name in store.list_names("failed")] == ["part-infra-"]


def test_a_segment_is_what_was_added(store):
    writer = dataset_writer(store)
    add(writer, 1)
    writer.log.commit()
    [path] = list_segments(store)
    table = read_segment(store, path)
    assert table.schema.equals(layout.INDEX_SCHEMA) and table["id"].to_pylist() == ["r1"]
