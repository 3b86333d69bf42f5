"""Rows written into a dataset as a run writes them, without a run."""

from __future__ import annotations

from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import read_rows
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.storage.store import Store


def row_log(store: Store, run_id: str = "run", **options) -> RowLog:
    """A log that knows what the dataset has."""
    return RowLog(store, list_existing(store), dataset_id(store), run_id, **options)


def dataset_writer(store: Store, run_id: str = "run", **options) -> DatasetWriter:
    return DatasetWriter(row_log(store, run_id, **options))


def rows_in(store: Store, folder: str) -> list[dict]:
    """The rows in parts of index/, failed/ or previews/."""
    return list(read_rows(store, folder))


def finish(writer: DatasetWriter) -> None:
    """Commit and fold what the writer was given, as the end of a run does."""
    writer.log.commit()
    writer.log.close()
