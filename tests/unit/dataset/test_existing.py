"""Existing rows of a dataset: known from the keys in its parts and segments, and updated while a run goes on."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.layout import row_key
from ltx_ray.dataset.parts import UnreadablePart, key_bytes
from ltx_ray.manifest.reader import RawRow
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import as_one_row_parts
from tests.support.datasets import dataset_writer, finish
from tests.support.results import CRASH, ITEM, NAN, OTHER, RENDERED
from tests.support.samples import request

A, B, C, D = (row_key(name) for name in "abcd")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def item(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()[:32]


@pytest.mark.parametrize("how", ["in segments", "folded", "in parts of one row"])
def test_the_listing_says_which_rows_exist_and_which_failed(store, how):
    writer = dataset_writer(store)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    writer.write_index(ITEM, request(id="b"), RENDERED)
    writer.write_failed(OTHER, request(id="c"), RawRow("m.jsonl", 1, {}), CRASH)
    writer.write_failed(OTHER, request(id="d"), RawRow("m.jsonl", 2, {}), NAN)
    illegal = writer.write_illegal(RawRow("m.jsonl", 3, {"prompt": ""}), ["m.jsonl:3:prompt: ..."])
    writer.write_preview(OTHER, request(id="c"), RawRow("m.jsonl", 1, {}), RENDERED)
    writer.log.commit()
    if how != "in segments":
        finish(writer)
    if how == "in parts of one row":
        as_one_row_parts(store), as_one_row_parts(store, "previews")
    store.write_bytes(f"latents/aa/{ITEM}.safetensors", b"")
    existing = list_existing(store)
    assert existing.has_row(ITEM, A) and existing.has_row(ITEM, B) and not existing.has_row(ITEM, C)
    assert existing.key_of(ITEM) in {A, B} and existing.key_of(OTHER) is None
    assert existing.has_latents(ITEM) and not existing.has_latents(OTHER)
    assert existing.has_preview(OTHER, C) and not existing.has_preview(OTHER, A) and not existing.has_preview(ITEM, A)
    assert (existing.preview_of(OTHER), existing.preview_of(ITEM)) == (C, None)
    assert (existing.failure(OTHER, C), existing.failure(OTHER, D), existing.failure(ITEM, A)) == ("infra", "row", None)
    assert existing.failed.kind_of(illegal) == "illegal"
    assert (existing.failures_of_key(C), existing.failures_of_key(A)) == ([(OTHER, "infra")], [])
    assert (existing.row_count, existing.failed_count, existing.latents.any) == (2, 3, True)
    assert existing.failed_kinds == {"row": 1, "infra": 1, "illegal": 1}
    assert (existing.pending_count, existing.preview_count) == (3 if how == "in segments" else 0, 1)


def test_failures_of_earlier_versions_are_known_from_their_names(store):
    for kind, item_id, key in (("row", ITEM, A), ("infra", OTHER, B), ("illegal", item(1), C)):
        store.write_bytes(f"failed/part-{kind}-{item_id}-{key}.parquet", b"")
    existing = list_existing(store)
    assert (existing.failure(ITEM, A), existing.failure(OTHER, B), existing.failure(item(1), C)) == (
        "row", "infra", "illegal",
    )  # fmt: skip


def test_a_new_dataset_is_empty(store):
    existing = list_existing(store)
    assert not (existing.row_count or existing.failed_count or existing.latents.any or existing.pending_count)
    assert not existing.has_row(ITEM, A) and existing.key_of(ITEM) is None and existing.failures_of_key(A) == []


def test_foreign_names_are_ignored(store):
    strays = [
        "index/_SUCCESS", "index/readme.txt", f"index/.part-{ITEM}-{A}.parquet.1234", f"index/part-{ITEM}",
        f"index/_part-{ITEM.upper()}-{A}.parquet", f"index/part-{ITEM}-{A}.parquet\n", "index/_lost-part-x.parquet",
        f"failed/part-other-{ITEM}-{A}.parquet", "failed/_x", f"latents/aa/.{ITEM}.safetensors.12", "latents/x",
        "state/wal/run/x.rows", "state/wal/00000000-index.rows", "state/wal/run/00000000-other.rows",
    ]  # fmt: skip
    for stray in strays:
        store.write_bytes(stray, b"")
    existing = list_existing(store, pytest.fail)
    assert not (existing.row_count or existing.failed_count or existing.latents.any or existing.segments)


def part(store: Store, name: str, *ids: str) -> None:
    table = pa.table({"item_id": [ITEM] * len(ids), "id": list(ids)})
    Path(store.path("index")).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, store.path(f"index/{name}"))


def test_rows_of_a_copied_or_renamed_part_are_done_because_readers_see_them(store):
    part(store, "part-copy.parquet", "a")
    part(store, "part-0badcafe-00000003.parquet", "b")
    existing = list_existing(store)
    assert existing.has_row(ITEM, A) and existing.has_row(ITEM, B)
    assert existing.index.path_of(key_bytes(ITEM, A)) == "index/part-copy.parquet"


def test_a_part_that_cannot_be_read_stops_a_run_if_it_is_the_datasets_own(store):
    store.write_bytes("index/part-copy.parquet", b"no Parquet")
    said: list[str] = []
    assert list_existing(store, said.append).row_count == 0
    assert len(said) == 1 and "index/part-copy.parquet is damaged" in said[0] and "verify --repair" in said[0]
    writer = dataset_writer(store)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    finish(writer)
    [own] = [name for name in store.list_names("index") if name != "part-copy.parquet"]
    data = bytearray(store.read_bytes(f"index/{own}"))
    group = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0)
    [items] = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "item_id"]
    data[items.dictionary_page_offset + items.total_compressed_size - 1] ^= 1  # inside a page
    for damaged in (bytes(data), b"no Parquet"):
        store.write_bytes(f"index/{own}", damaged)
        with pytest.raises(UnreadablePart, match="verify --repair sets it aside"):
            list_existing(store)


def test_a_part_with_damage_inside_is_said_at_once(store):
    """Arrow reports such damage as an error of the disk, in several lines, which would be retried for a minute."""
    name = "index/part-0badcafe-00000000.parquet"
    part(store, "part-0badcafe-00000000.parquet", "a", "b")
    whole = store.read_bytes(name)
    middle = len(whole) // 2
    for data in (whole[:4] + bytes(40) + whole[44:], whole[:middle] + b"\xff" * (len(whole) - middle - 8) + whole[-8:]):
        store.write_bytes(name, data)
        with pytest.raises(UnreadablePart, match=f"{name} is damaged .*verify --repair sets it aside") as caught:
            list_existing(Store(store.uri, wait=pytest.fail))
        assert "\n" not in str(caught.value)


def test_the_number_of_the_next_part_follows_the_highest(store):
    assert ExistingRows().index.next_number("0badcafe") == 0
    part(store, "part-0badcafe-00000000.parquet", "a")
    part(store, "part-0badcafe-00000041.parquet", "b")
    part(store, "part-deadbeef-00000099.parquet", "c")
    index = list_existing(store).index
    assert (index.next_number("0badcafe"), index.next_number("deadbeef"), index.next_number("00000000")) == (42, 100, 0)


def test_the_listing_of_an_object_store(s3, bucket):
    store = Store(f"{bucket}/out")
    assert list_existing(store).row_count == 0
    writer = dataset_writer(store)
    writer.write_index(ITEM, request(id="a"), RENDERED)
    finish(writer)
    assert (list_existing(store).has_row(ITEM, A), list_existing(store).row_count) == (True, 1)


def test_a_part_without_rows_is_no_obstacle(store):
    """As another program may leave one there, alone or beside others."""
    part(store, "empty.parquet")
    assert list_existing(store).row_count == 0
    part(store, "part-0badcafe-00000000.parquet", "a")
    assert list_existing(store).row_count == 1


def test_rows_are_pending_until_they_are_folded():
    rows, a, b = ExistingRows().index, key_bytes(ITEM, A), key_bytes(ITEM, B)
    rows.add_pending([a, a, b], "state/wal/run/00000000-index.rows")
    assert (len(rows), rows.pending_count, rows.has(a), rows.not_folded([a])) == (2, 2, True, [a])
    assert rows.path_of(a) == "state/wal/run/00000000-index.rows"
    rows.fold("part-0badcafe-00000000.parquet", [a])
    assert (len(rows), rows.pending_count, rows.has(a), rows.not_folded([a])) == (2, 1, True, [])
    assert rows.path_of(a) == "index/part-0badcafe-00000000.parquet" and rows.next_number("0badcafe") == 1
    rows.add_pending([a], "state/wal/run/00000001-index.rows")
    rows.drop_pending([b])
    assert (len(rows), rows.pending_count, rows.has(b), rows.key_of(ITEM)) == (1, 0, False, A)


def test_failures_come_and_go():
    failed, a, b = ExistingRows().failed, key_bytes(ITEM, A), key_bytes(OTHER, A)
    failed.load([("row", a), ("infra", b)])
    failed.add("infra", a)
    assert (failed.kind_of(a), len(failed), failed.kinds["infra"], failed.kinds["row"]) == ("infra", 2, 2, 0)
    failed.add("row", a)
    failed.add("row", a)
    assert (failed.kind_of(a), len(failed), failed.kinds["row"]) == ("row", 2, 1)
    failed.drop(b)
    failed.drop(b)
    assert (failed.kind_of(b), len(failed), failed.of_key(A)) == (None, 1, [(ITEM, "row")])


def test_items_with_the_same_first_64_bits_are_different():
    """The first 64 bits are searched for; the other bits are compared too."""
    existing, other = ExistingRows(), ITEM[:16] + "0" * 16
    existing.index.add_pending([key_bytes(ITEM, A)], "segment")
    assert not existing.has_row(other, A) and existing.key_of(other) is None
    existing.index.fold("part", [key_bytes(other, B)])
    assert (existing.key_of(ITEM), existing.key_of(other)) == (A, B)


def test_tens_of_thousands_of_rows_are_found(store):
    folder = Path(store.path("index"))
    folder.mkdir(parents=True)
    for n in range(3000):
        (folder / f"part-{item(n)}-{n:08x}.parquet").touch()
    existing = list_existing(store)
    for n in range(3000, 30_000, 900):  # enough for several sorted runs of the table
        existing.index.fold(f"part-{n}", [key_bytes(item(m), f"{m:08x}") for m in range(n, n + 900)])
    assert existing.row_count == 30_000
    assert all(
        existing.has_row(item(n), f"{n:08x}") and existing.key_of(item(n)) == f"{n:08x}" for n in range(0, 30_000, 7)
    )
    assert existing.index.path_of(key_bytes(item(29_999), f"{29_999:08x}")) == "index/part-29100"
    assert existing.index.path_of(key_bytes(item(5), f"{5:08x}")) == f"index/part-{item(5)}-{5:08x}.parquet"
    assert not any(existing.has_row(item(n), "00000000") for n in range(1, 30_000, 7))


def test_looking_up_many_items_misses_no_row():
    existing = ExistingRows()
    existing.index.fold("part", [key_bytes(item(n), A) for n in range(10_000)])
    heads = [bytes.fromhex(item(n))[:8] for n in range(20_000)]
    known = existing.look_up(heads)
    assert all(known.may_have_rows(head) for head in heads[:10_000])
    assert not any(known.may_have_rows(head) for head in heads[10_000:])
    existing.index.add_pending([key_bytes(item(15_000), A)], "segment")
    assert known.may_have_rows(heads[15_000]) and not known.may_have_rows(heads[15_001])
    existing.index.fold("another", [bytes.fromhex(item(15_000) + A), secrets.token_bytes(20)])
    assert known.may_have_rows(heads[15_000])
