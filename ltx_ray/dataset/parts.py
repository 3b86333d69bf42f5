"""Parts and segments of the dataset's tables as bytes, and the keys of their rows. No torch.

A part is a Parquet file of many rows, a segment an Arrow stream of a few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.storage.locations import join
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store

#: Bytes of a row's key: its item_id, and what tells the rows of one item apart.
ITEM_BYTES, KEY_BYTES = 16, 20
#: Columns that a row's key is made of.
KEY_COLUMNS = ("item_id", "id")
#: LZ4, because each column of a segment is compressed for itself: zstd takes ten times as long for 64 rows.
_WRITING = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
#: As parts are read, segments are read by the calling thread alone (storage/parquet.py).
_READING = pa.ipc.IpcReadOptions(use_threads=False)


class UnreadablePart(OSError):
    """A part or segment of the dataset, `path` in it, that is damaged."""

    def __init__(self, message: str, *, path: str):
        super().__init__(message)
        self.path = path


def one_line(message: object) -> str:
    """The beginning of a message that may have several lines, as Arrow's have."""
    return " ".join(str(message).split())[:200]


def unreadable(store: Store, path: str, error: object) -> UnreadablePart:
    return UnreadablePart(
        f"{join(store.name, path)} is damaged ({one_line(error)}); ltx-ray verify --repair sets it aside", path=path
    )


# --- keys ----------------------------------------------------------------------------------------


def key_bytes(item_id: str, key: str) -> bytes:
    """A row's key as bytes. Raises ValueError when they are no hex digits."""
    return bytes.fromhex(item_id + key)


def keys_of(table: pa.Table) -> list[bytes]:
    """The keys of the rows of a table with KEY_COLUMNS. Raises ValueError for a row without an item_id."""
    data, width = keys_data(table), KEY_BYTES
    return [data[at : at + width] for at in range(0, len(data), width)]


def keys_data(table: pa.Table) -> bytes:
    """The same in one piece."""
    items, ids = (table[name].to_pylist() for name in KEY_COLUMNS)
    if None in items or {*map(len, items)} - {2 * ITEM_BYTES}:
        raise ValueError("a row has no item_id")
    heads = np.frombuffer(bytes.fromhex("".join(items)), np.uint8).reshape(-1, ITEM_BYTES)
    hashes = b"".join([hashlib.sha256((row_id or "").encode()).digest()[:4] for row_id in ids])
    return np.hstack([heads, np.frombuffer(hashes, np.uint8).reshape(-1, KEY_BYTES - ITEM_BYTES)]).tobytes()


# --- segments ------------------------------------------------------------------------------------


def encode_segment(rows: Sequence[Mapping[str, Any]] | pa.Table, table: str) -> bytes:
    """A segment of rows. Columns that they lack are null."""
    schema, sink = layout.SEGMENT_SCHEMAS[table], pa.BufferOutputStream()
    if isinstance(rows, pa.Table):
        rows = with_columns(rows, schema)
    else:
        rows = pa.Table.from_pylist(rows, schema=schema)
    with pa.ipc.new_stream(sink, schema, options=_WRITING) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def read_segment(store: Store, path: str) -> pa.Table:
    """Raises FileNotFoundError, and UnreadablePart for a damaged one."""
    data = store.read_bytes(path)
    try:
        with pa.ipc.open_stream(data, options=_READING) as reader:
            return reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise unreadable(store, path, error) from None


def segment_table(path: str) -> str:
    """The table of the segment at `path`."""
    return path.rpartition("-")[2].removesuffix(".rows")


def list_segments(store: Store) -> list[str]:
    """Paths of the dataset's segments, in the order in which their runs began and wrote them."""
    names = store.names(layout.SEGMENTS)
    return sorted(f"{layout.SEGMENTS}/{name}" for name in names if layout.SEGMENT.fullmatch(name))


# --- parts ---------------------------------------------------------------------------------------


def encode_part(rows: pa.Table, table: str, writer: str = "") -> bytes:
    """A part of `rows`, which have at least the columns of `table`. `writer`: who writes it, for its metadata."""
    rows = with_columns(rows, layout.PART_SCHEMAS[table]).replace_schema_metadata({"ltx_ray.run": writer})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def with_columns(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """`rows` with the columns of `schema` alone. Those that they lack are null."""
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.schema.names else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def read_part(store: Store, path: str, columns: list[str] | None = None) -> pa.Table:
    """A part of the dataset. Raises FileNotFoundError, and UnreadablePart for a damaged one."""
    data = store.read_bytes(path)
    try:
        return read_parquet(data, columns)
    except pa.ArrowException as error:
        raise unreadable(store, path, error) from None


def read_keys(store: Store, path: str) -> bytes:
    """The keys of a part's rows in one piece, of which only two columns are read. Raises as read_part does."""
    try:
        return keys_data(store.read_columns(path, KEY_COLUMNS))
    except (pa.ArrowException, ValueError) as error:
        raise unreadable(store, path, error) from None


def count_rows(store: Store, path: str) -> int:
    """Rows of a part, by its footer; none of one that cannot be read."""
    try:
        with store.fs.open_input_file(store.path(path)) as file:
            return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError):
        return 0


def read_rows(store: Store, folder: str) -> Iterator[dict[str, Any]]:
    """All rows in parts of index/, failed/ or previews/. Raises UnreadablePart."""
    for name in filter(layout.is_part, store.list_names(folder)):
        for batch in read_part(store, f"{folder}/{name}").to_batches(1024):
            yield from batch.to_pylist()


def take(rows: pa.Table, numbers: Iterable[int]) -> pa.Table:
    """The rows of these numbers, in this order."""
    return rows.take(pa.array(numbers, pa.int64()))
