"""Exports the index to a Delta table, for those who update rows. Clips stay where they are."""

from __future__ import annotations

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.export import ExportJob, Place
from ltx_ray.dataset.parts import count_rows, one_line, read_part, with_columns
from ltx_ray.storage.locations import split_options

#: The column with the clip's place in full.
_CLIP_URI = pa.field("clip_uri", pa.string())
_SCHEMA = layout.INDEX_SCHEMA.append(_CLIP_URI)


def export_delta(job: ExportJob) -> tuple[int, int]:
    """Append the rows of parts that the table does not have; returns how many were appended, and its version.

    Each part is one commit, and the commit names it, so that none is appended twice whatever happens. Raises ValueError
    when the package is not installed, or the place holds something else.
    """
    try:
        from deltalake.exceptions import DeltaError
    except ImportError:
        raise ValueError("--to: 'delta' without the package deltalake; legal: pip install 'ltx-ray[delta]'") from None
    try:
        return _append(job)
    except DeltaError as error:
        raise OSError(f"{job.target.name}: the Delta table cannot be written ({one_line(error)})") from None


def _append(job: ExportJob) -> tuple[int, int]:
    from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

    target = job.target
    uri = split_options(target.uri)[0]

    def opened() -> DeltaTable:
        return DeltaTable(uri, storage_options=target.object_store_options())

    table = opened() if DeltaTable.is_deltatable(uri, target.object_store_options()) else None
    if table is None and next(iter(target.names("")), None) is not None:
        raise ValueError(f"{target.name}: is not empty, and holds no Delta table; legal: an empty place, or a table")
    places: dict[str, Place] = {}
    parts = job.parts({})
    for dataset in {part.dataset for part in parts}:
        newest = table.transaction_version(_application(dataset)) if table is not None else None
        places[dataset] = Place(0 if newest is None else newest + 1)
    parts = [part for part in parts if part.number >= places[part.dataset].part]
    total = sum(count_rows(job.source, f"{layout.INDEX}/{part.name}") for part in parts)
    root = split_options(job.source.name)[0].rstrip("/")
    done = 0
    for part in parts:
        rows = read_part(job.source, f"{layout.INDEX}/{part.name}")
        clips = [None if clip is None else f"{root}/{clip}" for clip in rows["clip"].to_pylist()]
        rows = with_columns(rows, layout.INDEX_SCHEMA).append_column(_CLIP_URI, pa.array(clips, pa.string()))
        write_deltalake(
            uri, rows, mode="append", storage_options=target.object_store_options(), name=f"ltx-ray {part.dataset}",
            commit_properties=CommitProperties(app_transactions=[Transaction(_application(part.dataset), part.number)]),
        )  # fmt: skip
        table = opened()
        done += len(rows)
        job.on_rows(done, total)
    return done, table.version() if table is not None else 0


def _application(dataset: str) -> str:
    """By what name the table's log keeps the number of the newest part of a dataset."""
    return f"ltx-ray-{dataset}"
