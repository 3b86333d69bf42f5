"""The examples of docs/dataset.md read what `export` writes. Each is skipped where its package is not installed."""

from __future__ import annotations

import pytest

from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, boxes, build
from tests.support.doc_examples import make_dataset, run_example, sql_examples

pytestmark = pytest.mark.slow  # these packages take seconds to import


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_webdataset_reads_shards(tmp_path):
    pytest.importorskip("webdataset")
    make_dataset(tmp_path, shards="webdataset")
    found = list(run_example("webdataset")["samples"])
    assert sorted(clip for clip, _ in found) == sorted(map(boxes, (ITEMS[0], *ITEMS)))
    assert {prompt for _, prompt in found} == {"a cat"}


def test_datasets_reads_the_folder(tmp_path):
    pytest.importorskip("datasets")
    make_dataset(tmp_path, folder="hf")
    clips = run_example("datasets")["clips"]
    assert sorted(clips["id"]) == ["a", "b", "c", "d"]
    for row in clips:
        assert row["prompt"] == "a cat"
        with open(row["video"]["path"], "rb") as file:
            assert file.read() == boxes(row["item_id"])


def test_duckdb_reads_the_index(tmp_path):
    pytest.importorskip("duckdb")
    make_dataset(tmp_path)
    assert sorted(row_id for row_id, _ in run_example("duckdb")["still"]) == ["a", "b", "c", "d"]


def test_duckdb_reads_the_index_of_one_output_and_of_several(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    for name in ("out", "shard-0", "shard-1"):
        build(Store(str(tmp_path / name)))
    of_one, of_several = sql_examples()
    assert duckdb.sql(of_one).fetchall() == [], "their motion is null"
    found = duckdb.sql(of_several).fetchall()
    assert sorted(row_id for row_id, _ in found) == sorted([*"abcd"] * 2)
    assert all((tmp_path / place).is_file() for _, place in found)


def test_deltalake_reads_and_changes_the_table(tmp_path):
    pytest.importorskip("deltalake")
    make_dataset(tmp_path, table="delta")
    left = run_example("deltalake")["left"].to_pylist()
    assert {row["clip_uri"] for row in left} <= {f"{tmp_path}/out/clips/{i[:2]}/{i}.mp4" for i in ITEMS}
    assert sorted(row["id"] for row in left) == ["a", "b", "c", "d"], "their still_share is null"
