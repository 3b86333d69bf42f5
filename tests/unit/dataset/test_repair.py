"""Repairing a dataset: afterwards readers see every row once, and lost rows are known to be missing."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.layout import ADDED_COLUMNS, INDEX_SCHEMA, part_name, row_key
from ltx_ray.dataset.repair import is_whole_mp4, repair
from ltx_ray.engine.mp4 import write_mp4
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, boxes, build, clip_of, part_of, rows_of


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    """A dataset of three items; the first has two rows."""
    return build(Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket")))


def run_repair(store: Store):
    """(result, messages, remaining rows) of a repair, after checking that they agree."""
    existing, messages = list_existing(store), []
    repaired = repair(store, existing, messages.append)
    assert len(messages) == sum(map(bool, vars(repaired).values()))
    rows = rows_of(store)
    assert len(set(rows)) == len(rows), "a plain reader of part-* sees a row twice"
    assert existing.row_count == len(rows) and all(existing.has_row(item, row_key(name)) for item, name in rows)
    return repaired, messages, set(rows)


ALL = {(ITEMS[0], "a"), (ITEMS[0], "b"), (ITEMS[1], "c"), (ITEMS[2], "d")}


def test_an_undamaged_dataset_is_left_alone(store):
    before = store.list_names("", recursive=True)
    repaired, messages, rows = run_repair(store)
    assert not repaired and not messages and rows == ALL
    assert store.list_names("", recursive=True) == before


def test_a_missing_dataset_is_not_created(tmp_path, bucket):
    for place in (str(tmp_path / "none"), f"{bucket}/none"):
        store = Store(place)
        assert not repair(store, list_existing(store), pytest.fail)
        assert not store.exists("")


@pytest.mark.parametrize("name", ["part-copy.parquet", "part-0.parquet", "copy of it.parquet", "PART.parquet"])
def test_a_duplicated_part_is_hidden_from_readers(store, name):
    store.write_bytes(f"index/{name}", store.read_bytes(part_of(1, "c")))
    repaired, messages, rows = run_repair(store)
    assert repaired.duplicates == [name] and not repaired.published and rows == ALL
    assert store.exists(f"index/_duplicate-{name}") and name in messages[0]
    assert not run_repair(store)[0], "a second repair finds nothing"


def test_a_renamed_part_gets_its_name_back(store):
    store.move(part_of(1, "c"), "index/part-renamed.parquet")
    repaired, _, rows = run_repair(store)
    assert repaired.published == [part_name(ITEMS[1], row_key("c"))] and rows == ALL
    table = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c"))))
    assert table.schema.equals(INDEX_SCHEMA) and table.to_pylist()[0]["latents_sha256"] == "d" * 64


def test_a_renamed_part_of_an_earlier_version_gets_its_name_and_all_columns(store):
    table = pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c")))).drop_columns(list(ADDED_COLUMNS))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes("index/part-renamed.parquet", buffer.getvalue())
    store.delete(part_of(1, "c"))
    repaired, _, rows = run_repair(store)
    assert repaired.published == [part_name(ITEMS[1], row_key("c"))] and rows == ALL
    assert pq.read_table(io.BytesIO(store.read_bytes(part_of(1, "c")))).schema.equals(INDEX_SCHEMA)


def test_rows_that_only_a_merged_part_holds_get_parts_of_their_own(store):
    tables = [pq.read_table(io.BytesIO(store.read_bytes(part_of(*which)))) for which in ((0, "a"), (0, "b"), (1, "c"))]
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), buffer)
    store.write_bytes("index/part-merged.parquet", buffer.getvalue())
    store.delete(part_of(0, "b"))
    store.delete(part_of(1, "c"))
    repaired, _, rows = run_repair(store)
    assert len(repaired.published) == 2 and repaired.duplicates == ["part-merged.parquet"] and rows == ALL


def test_a_renamed_part_of_a_lost_clip_does_not_come_back(store):
    store.move(part_of(1, "c"), "index/part-renamed.parquet")
    store.delete(clip_of(1))
    repaired, _, rows = run_repair(store)
    assert repaired.lost == repaired.published and rows == ALL - {(ITEMS[1], "c")}


@pytest.mark.parametrize("content", [b"", b"PAR1 no", None])
def test_a_misnamed_part_that_cannot_be_read_is_hidden_from_readers(store, content):
    if content is None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"id": ["a"]}), buffer)
        content = buffer.getvalue()
    store.write_bytes("index/part-odd.parquet", content)
    repaired, _, rows = run_repair(store)
    assert repaired.unreadable == ["part-odd.parquet"] and rows == ALL
    assert store.read_bytes("index/_unreadable-part-odd.parquet") == content


def test_an_empty_part_is_hidden_from_readers_and_its_row_is_to_be_rendered_again(store):
    store.write_bytes(part_of(2, "d"), b"")
    repaired, messages, rows = run_repair(store)
    assert repaired.unreadable == [part_name(ITEMS[2], row_key("d"))] and rows == ALL - {(ITEMS[2], "d")}
    assert "rendered again" in messages[0]


def test_every_row_of_a_lost_clip_is_to_be_rendered_again(store):
    store.delete(clip_of(0))
    repaired, messages, rows = run_repair(store)
    assert len(repaired.lost) == 2 and rows == {(ITEMS[1], "c"), (ITEMS[2], "d")}
    assert store.list_names("index")[:2] == sorted(f"_lost-{part_name(ITEMS[0], row_key(n))}" for n in "ab")
    assert "no longer has a complete clip" in messages[0]


def test_an_empty_clip_is_lost(store):
    store.write_bytes(clip_of(1), b"")
    assert run_repair(store)[2] == ALL - {(ITEMS[1], "c")}


@pytest.mark.parametrize("cut", ["half", "one byte", "not an mp4", "longer"])
def test_an_incomplete_clip_on_a_disk_is_lost(tmp_path, cut):
    store = build(Store(str(tmp_path)))
    whole = store.read_bytes(clip_of(1))
    damaged = {"half": whole[: len(whole) // 2], "one byte": whole[:-1], "not an mp4": b"x" * 64}
    store.write_bytes(clip_of(1), damaged.get(cut, whole + b"x"))
    repaired, _, rows = run_repair(store)
    assert len(repaired.lost) == 1 and rows == ALL - {(ITEMS[1], "c")}


def test_a_row_that_was_rendered_without_a_clip_needs_none(store):
    build(store, rows=((2, "latents-only"),), clip=False)
    store.delete(clip_of(2))
    repaired, _, rows = run_repair(store)
    assert repaired.lost == [part_name(ITEMS[2], row_key("d"))]
    assert rows == (ALL | {(ITEMS[2], "latents-only")}) - {(ITEMS[2], "d")}


def test_names_that_readers_ignore_are_left_alone(store):
    ignored = ["index/_lost-part-x.parquet", "index/.part.parquet.0123abcd", "index/_SUCCESS"]
    for name in ignored:
        store.write_bytes(name, b"x")
    assert not run_repair(store)[0] and all(store.exists(name) for name in ignored)


def test_a_message_shortens_a_long_list(store):
    for n in range(10):
        store.write_bytes(f"index/part-{n}.parquet", store.read_bytes(part_of(1, "c")))
    _, [message], _ = run_repair(store)
    assert "part-2.parquet and 7 more" in message and "part-3" not in message


# --- boxes ---------------------------------------------------------------------------------------


def box(kind: bytes, content: bytes = b"", long: bool = False) -> bytes:
    if long:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize(
    "data, whole",
    [
        (box(b"ftyp", b"isom") + box(b"moov") + box(b"mdat", b"x" * 100), True),
        (box(b"ftyp") + box(b"free", b"123") + box(b"mdat", b"x" * 100, long=True) + box(b"moov", b"1"), True),
        (box(b"ftyp") + box(b"moov") + struct.pack(">I4s", 0, b"mdat") + b"to the end", True),
        (box(b"ftyp") + box(b"moov") + struct.pack(">I4sQ", 1, b"mdat", 50) + b"too short", False),
        (box(b"ftyp") + box(b"moov"), False),
        (box(b"ftyp") + box(b"mdat", b"1"), False),
        (box(b"moov") + box(b"mdat", b"1"), False),
        (box(b"ftyp") + box(b"moov") + box(b"mdat", b"1") + b"\0\0\0", False),
        (box(b"ftyp") + box(b"moov") + box(b"mdat", b"1") + struct.pack(">I4s", 7, b"free"), False),
        (b"", False),
        (b"\0" * 200, False),
    ],
)
def test_an_mp4_is_whole_when_its_top_level_boxes_are(tmp_path, data, whole):
    (tmp_path / "x.mp4").write_bytes(data)
    assert is_whole_mp4(str(tmp_path / "x.mp4")) is whole
    assert is_whole_mp4(str(tmp_path / "none.mp4")) is None


def test_a_muxed_clip_is_whole_only_at_its_full_length(tmp_path):
    path = str(tmp_path / "x.mp4")
    frames = [np.full((9, 96, 64), 128, np.uint8)]
    sound = np.zeros((2, 20000), np.float32)
    write_mp4(path, frames, width=64, height=64, frame_rate=Fraction(24), audio=sound, sample_rate=48000, metadata={})
    data = Path(path).read_bytes()
    assert is_whole_mp4(path) is True
    for cut in (len(data) - 1, len(data) // 2, 40, 8, 4):
        os.truncate(path, cut)
        assert is_whole_mp4(path) is False, cut


def test_the_boxes_of_the_fake_engine_are_whole(tmp_path):
    (tmp_path / "x.mp4").write_bytes(boxes(ITEMS[0]))
    assert is_whole_mp4(str(tmp_path / "x.mp4")) is True
