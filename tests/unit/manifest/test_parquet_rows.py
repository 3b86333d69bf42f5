"""Parquet files that are damaged, or whose rows are large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_ray.manifest.raw import RawRow, is_damage
from ltx_ray.manifest.reader import open_manifest, read_manifest
from ltx_ray.manifest.rules import IllegalRow, LegalRow, RowRules, judge
from ltx_ray.storage.retry import StoreUnavailable
from ltx_ray.storage.store import Store

ROWS, GROUP = 9000, 3000
from tests.support.datasets import dataset_writer, finish


def damaged(path: Path, *columns: str, codec: str = "snappy", dictionary: bool = False) -> Path:
    """A file of three row groups; in the second one, bytes of these columns are overwritten."""
    texts = {name: [f"{name} {n} {os.urandom(20).hex()}" for n in range(ROWS)] for name in ("prompt", "note")}
    table = pa.table({**texts, "seed": range(ROWS)})
    pq.write_table(
        table,
        path,
        row_group_size=GROUP,
        compression=codec,
        use_dictionary=dictionary,
        data_page_size=20_000,
        write_page_checksum=True,
    )
    group, data = pq.ParquetFile(path).metadata.row_group(1), bytearray(path.read_bytes())
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema in columns:
            middle = chunk.data_page_offset + chunk.total_compressed_size // 2
            data[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
@pytest.mark.parametrize("extra", [True, False])
def test_damage_in_a_known_column_costs_its_rows(tmp_path, codec, extra):
    path = damaged(tmp_path / "m.parquet", "prompt", codec=codec)
    rows = [judge(raw, RowRules()) for raw in open_manifest(str(path)).rows(extra)]
    illegal = [row for row in rows if isinstance(row, IllegalRow)]
    legal = [row.raw.number for row in rows if not isinstance(row, IllegalRow)]
    [message] = [message for row in illegal for message in row.messages()]
    first = illegal[0].raw.number
    assert GROUP < first <= 2 * GROUP
    assert legal == [*range(1, first), *range(2 * GROUP + 1, ROWS + 1)]
    assert f"m.parquet:{first}:row: \"column 'prompt' of rows {first} to {2 * GROUP} cannot be read" in message
    assert message.endswith("legal: an undamaged file")


def test_damage_in_an_unknown_column_costs_its_values(tmp_path):
    path = damaged(tmp_path / "m.parquet", "note")
    requests = [judge(raw, RowRules()).request for raw in read_manifest(str(path))]
    assert [request.seed for request in requests] == list(range(ROWS))
    lost = [n for n, request in enumerate(requests) if json.loads(request.extra)["note"] is None]
    assert lost and lost == list(range(lost[0], 2 * GROUP)) and lost[0] >= GROUP


def test_small_row_groups_are_read_together_and_lost_alone(tmp_path):
    path, count = tmp_path / "m.parquet", 400
    pq.write_table(pa.table({"prompt": [os.urandom(50).hex() for _ in range(count)]}), path, row_group_size=10)
    chunk, data = pq.ParquetFile(path).metadata.row_group(20).column(0), bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 100] = b"\xff" * 100
    path.write_bytes(data)
    rows = list(read_manifest(str(path)))
    assert [row.number for row in rows if row.unreadable is None] == [*range(1, 201), *range(211, count + 1)]


def test_a_row_of_a_damaged_file_is_recorded_and_retried_as_it_was(tmp_path):
    path = damaged(tmp_path / "m.parquet", "prompt")
    [before] = [row for raw in read_manifest(str(path)) if isinstance(row := judge(raw, RowRules()), IllegalRow)]
    writer = dataset_writer(Store(str(tmp_path / "out")))
    writer.write_illegal(before.raw, before.messages())
    finish(writer)
    [again] = [judge(raw, RowRules()) for raw in read_manifest(str(tmp_path / "out" / "failed"))]
    assert again.messages() == before.messages() and again.raw.source == before.raw.source


@pytest.mark.parametrize("bits, exact", [(16, 2**11), (32, 2**24)])
@pytest.mark.parametrize("dictionary", [False, True])
def test_integers_that_a_short_float_does_not_hold_are_refused(tmp_path, bits, exact, dictionary):
    """The seed 2^24 + 1 is stored as 2^24 in 32 bits, and a retry must not take it for that either."""
    seeds = pa.array(np.array([5, exact - 1, exact + 1], dtype=f"float{bits}"))
    if dictionary:
        seeds = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), seeds)
    pq.write_table(pa.table({"prompt": ["a"] * 3, "seed": seeds, "frame_rate": seeds}), tmp_path / "m.parquet")
    one, two, three = (judge(raw, RowRules()) for raw in read_manifest(str(tmp_path / "m.parquet")))
    assert isinstance(one, LegalRow) and one.request.seed == 5
    wrong = [problem.column for problem in two.problems] if isinstance(two, IllegalRow) else []
    assert "seed" not in wrong
    assert isinstance(three, IllegalRow)
    [message] = [text for text in three.messages() if ":seed:" in text]
    assert f"'{exact} as a float of {bits} bits', legal: a whole number" in message
    writer = dataset_writer(Store(str(tmp_path / "out")))
    writer.write_illegal(three.raw, three.messages())
    finish(writer)
    [again] = [judge(raw, RowRules()) for raw in read_manifest(str(tmp_path / "out" / "failed"))]
    assert again.messages() == three.messages()


def test_a_file_that_changes_while_it_is_read_is_an_illegal_row(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "seed": [1]}), path)
    manifest = open_manifest(str(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    [row] = manifest.rows()
    assert "its columns have changed" in row.unreadable
    path.write_bytes(b"no Parquet")
    [row] = manifest.rows()
    assert "the rest of the file cannot be read" in row.unreadable
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        list(manifest.rows())


def test_errors_of_disks_and_stores_are_no_damage():
    assert is_damage(OSError("Corrupt snappy compressed data.")) and is_damage(pa.ArrowInvalid("bad page"))
    assert not is_damage(OSError(5, "Input/output error"))
    assert not is_damage(StoreUnavailable("s3://b: reading m.parquet failed (tried 12 times in 61 s): AWS Error"))
    assert not is_damage(OSError("AWS Error ACCESS_DENIED during HeadObject operation: HTTP status 403"))
    assert not is_damage(FileNotFoundError(2, "gone")) and not is_damage(ValueError("a mistake of ours"))


def test_tables_of_other_people_may_have_the_columns_of_failed(tmp_path):
    path = tmp_path / "m.parquet"
    stored = ["{}", None, "no JSON", "[1]", '{"prompt": "a"}']
    pq.write_table(pa.table({"manifest_row": stored, "source": ["x:y", None, "m.jsonl:2", ":", "n:3"]}), path)
    rows = list(read_manifest(str(path)))
    assert all(isinstance(row, RawRow) and row.from_failed for row in rows)
    assert [row.source for row in rows] == ["x:0", f"{path}:0", "m.jsonl:2", ":0", "n:3"]
    assert [row.unreadable is None for row in rows] == [True, False, False, False, True]


# --- memory ------------------------------------------------------------------------------------------------------

MAKE = """
import os, pyarrow as pa, pyarrow.parquet as pq
kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
writer = pq.ParquetWriter("m.parquet", pa.schema([("prompt", pa.string()), ("image", kind), ("same", pa.string())]),
                          compression="snappy")
for group in range(4):
    images = [{"bytes": os.urandom(400_000), "path": "a.png"} for _ in range(100)]
    columns = {"prompt": ["a"] * 100, "image": pa.array(images, kind), "same": ["y" * 300_000] * 100}
    writer.write_table(pa.table(columns))
writer.close()
"""
READ = """
import resource
from ltx_ray.manifest.reader import open_manifest
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
rows = list(open_manifest("m.parquet").rows())
print(len(rows), rows[0].values["image"]["bytes"]["bytes"], peak() - before)
"""


def test_memory_is_bounded_by_bytes(tmp_path):
    """160 MB of pictures, and a text of 300 KB that the file holds once and each row has."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for code in (MAKE, READ):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
    rows, size, megabytes = map(int, run.stdout.split())
    assert (rows, size) == (400, 400_000)
    assert megabytes < 150, "no more than a page or two of the file at once"


def test_a_plan_does_not_read_what_no_request_has(tmp_path):
    path = damaged(tmp_path / "m.parquet", "note")
    manifest = open_manifest(str(path))
    assert all(set(raw.values) == {"prompt", "seed"} for raw in manifest.rows(extra=False))
    assert {frozenset(raw.values) for raw in manifest.rows()} == {frozenset({"prompt", "note", "seed"})}
