"""What others read index/ with sees every row once, and none twice while a run writes."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer
from tests.support.results import RENDERED
from tests.support.samples import request

ROWS, PART = 600, 50


def with_pyarrow(index: str) -> list[str]:
    import pyarrow.dataset as ds

    return ds.dataset(index).to_table(columns=["item_id"])["item_id"].to_pylist()


def with_duckdb(index: str) -> list[str]:
    duckdb = pytest.importorskip("duckdb")
    return [item for (item,) in duckdb.sql(f"SELECT item_id FROM read_parquet('{index}/*.parquet')").fetchall()]


def with_polars(index: str) -> list[str]:
    polars = pytest.importorskip("polars")
    return polars.read_parquet(f"{index}/*.parquet", columns=["item_id"])["item_id"].to_list()


def with_datasets(index: str) -> list[str]:
    datasets = pytest.importorskip("datasets")
    # In memory and not from a cache: the folder grows.
    paths = sorted(map(str, Path(index).glob("*.parquet")))
    return [row["item_id"] for row in datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)]


READERS = [with_pyarrow, with_duckdb, with_polars, with_datasets]


class Run:
    """Writes ROWS rows, of which it folds PART at a time, on a thread of its own."""

    def __init__(self, output: Path):
        self._writer = dataset_writer(Store(str(output)), part_rows=PART)
        self.items = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(ROWS)]
        self._write(self.items[:PART])
        self.thread = threading.Thread(target=self._rest, daemon=True)
        #: How many parts it may write.
        self.parts = threading.Semaphore(0)

    def _write(self, items: list[str]) -> None:
        for item_id in items:
            self._writer.write_index(item_id, request(id=f"row-{item_id}", prompt="a cat"), RENDERED)
        self._writer.log.commit()
        self._writer.log.fold()

    def _rest(self) -> None:
        for start in range(PART, ROWS, PART):
            self.parts.acquire()
            self._write(self.items[start : start + PART])


@pytest.mark.parametrize("read", READERS)
def test_no_row_is_seen_twice_while_a_run_writes_and_all_are_at_the_end(tmp_path, monkeypatch, read):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    run = Run(tmp_path / "out")
    index = str(tmp_path / "out" / "index")
    assert sorted(read(index)) == sorted(run.items[:PART])
    run.thread.start()
    seen = [PART]
    for _ in range(PART, ROWS, PART):
        run.parts.release()  # it is written during the read
        items = read(index)
        assert len(set(items)) == len(items) >= seen[-1] and set(items) <= set(run.items)
        seen.append(len(items))
    run.thread.join()
    assert sorted(read(index)) == sorted(run.items)


def test_ray_data_reads_it_too(request, tmp_path):
    pytest.importorskip("pandas", reason="Ray Data needs it")
    request.getfixturevalue("cluster")
    import ray

    run, index = Run(tmp_path / "out"), str(tmp_path / "out" / "index")

    def read() -> list[str]:
        return [row["item_id"] for row in ray.data.read_parquet(index, columns=["item_id"]).take_all()]

    run.thread.start()
    run.parts.release(ROWS // PART)
    items = read()
    assert PART <= len(set(items)) == len(items) and set(items) <= set(run.items)
    run.thread.join()
    assert sorted(read()) == sorted(run.items)
