"""Parquet and JSONL manifests as a stream of raw rows.

An unusable file is a ValueError before the first row. An unusable row is part of the stream.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ltx_ray.manifest.columns import COLUMNS, Mistyped, arrow_type_fits, shown
from ltx_ray.storage.locations import join, parent
from ltx_ray.storage.store import Store

#: Rows of a JSONL file that are looked at to tell whether a whole column has the wrong type.
_PEEK_ROWS = 1000
#: Column of failed/ and previews/ that holds the manifest row as JSON, so that these tables are manifests themselves.
FAILED_ROW_COLUMN = "manifest_row"
#: The only key of that JSON for a row that could not be read.
UNREADABLE = "_unreadable"
#: A key of that JSON for a row whose id belonged to another row.
DUPLICATE = "_duplicate_id"
#: Parquet rows that are converted at once, and bytes of a column that are read ahead.
_PARQUET_ROWS, _PARQUET_BUFFER = 4096, 1 << 20


class RawRow(NamedTuple):
    """A row as read: its place (`file` and `number`, from 1) and its values, or why it has none (`unreadable`)."""

    file: str
    number: int
    values: Mapping[str, Any]
    unreadable: str | None = None
    #: Its id belonged to another row. Only an edit of the manifest can change that, not a retry.
    duplicate: bool = False
    #: Read from failed/ or previews/ of a dataset: its defaults are resolved, and it is one sample of its prompt.
    from_failed: bool = False

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"


def read_manifest(uri: str) -> Iterator[RawRow]:
    """Stream the rows of a manifest: a .jsonl, .ndjson or .json file, a .parquet file, or a folder of such files.

    Raises ValueError at once (not at the first `next`) for a manifest that is missing or unreadable, or that has no
    `prompt` column or a column of the wrong type.
    """
    store = Store(uri)
    kind = store.fs.get_file_info(store.root).type
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"{store.name}: no such manifest; legal: a .jsonl or .parquet file, or a folder of them")
    if kind == pafs.FileType.Directory:
        selector = pafs.FileSelector(store.root, recursive=True)
        files = sorted(
            info.path
            for info in store.fs.get_file_info(selector)
            if info.type == pafs.FileType.File
            and info.path.endswith((".parquet", ".jsonl", ".ndjson"))
            and not any(part.startswith((".", "_")) for part in info.path[len(store.root) :].split("/"))
        )
        if not files:
            raise ValueError(f"{store.name}: holds no .parquet or .jsonl file")
        names = [join(store.name, path[len(store.root) + 1 :]) for path in files]
    else:
        files, names = [store.root], [store.name]
    readers = []
    for path, name in zip(files, names, strict=True):
        if path.endswith((".jsonl", ".ndjson", ".json")):
            readers.append(_jsonl_rows(store.fs, path, name))
        elif path.endswith((".parquet", ".pq")):
            readers.append(_parquet_rows(store.fs, path, name))
        else:
            raise ValueError(f"{name}: not a manifest; legal: a name that ends in .jsonl, .ndjson, .json or .parquet")
    return itertools.chain.from_iterable(readers)


def manifest_folder(uri: str) -> str:
    """The folder from which a manifest's relative image paths count."""
    store = Store(uri)
    if store.fs.get_file_info(store.root).type == pafs.FileType.Directory:
        return store.uri
    return parent(store.uri)


def _parquet_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    try:
        # closed at once: a folder may have more files than a process may open
        with fs.open_input_file(path) as file:
            schema = pq.ParquetFile(file).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet ({error})") from None
    if {FAILED_ROW_COLUMN, "source"} <= set(schema.names):
        return _failed_rows(fs, path, name)
    if "prompt" not in schema.names:
        raise ValueError(f"{name}: has no column 'prompt' (it has {', '.join(schema.names) or 'none'})")
    for column_name in schema.names:
        column = COLUMNS.get(column_name)
        if column is not None and not arrow_type_fits(column, schema.field(column_name).type):
            found = schema.field(column_name).type
            raise ValueError(f"{name}: column '{column_name}' has type {found}; legal: {column.type} ({column.legal})")

    return map(RawRow, itertools.repeat(name), itertools.count(1), _parquet_values(fs, path, name))


def _parquet_values(
    fs: pafs.FileSystem, path: str, name: str, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    try:
        with fs.open_input_file(path) as file:
            # without these options whole columns of a row group are read at once and kept until the end of the file
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                names = batch.schema.names
                for cells in zip(*map(_cells, batch.columns), strict=True):
                    yield dict(zip(names, cells, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet ({error})") from None


def _cells(column: pa.Array) -> list[Any]:
    values = column.to_pylist()
    if pa.types.is_string(column.type) or pa.types.is_integer(column.type):
        return values
    # pandas writes gaps in a column of numbers as NaN
    return [None if _is_nan(value) else value for value in values]


def _failed_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    for row in _parquet_values(fs, path, name, [FAILED_ROW_COLUMN, "source"]):
        # the row keeps the place in its manifest, by which later runs recognize it
        origin, _, number = (row["source"] or f"{name}:0").rpartition(":")
        yield _parse_line(origin, int(number), row[FAILED_ROW_COLUMN])._replace(from_failed=True)


def _jsonl_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    try:
        peeked = list(itertools.islice(_parsed_lines(fs, path, name), _PEEK_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read ({error})") from None
    readable = [row for row in peeked if row.unreadable is None]
    if peeked and not readable:
        raise ValueError(f"{name}: cannot be read as JSON lines ({peeked[0].source}: {peeked[0].unreadable})")
    if readable and not any("prompt" in row.values for row in readable):
        raise ValueError(f"{name}: has no column 'prompt' (it has {', '.join(sorted(readable[0].values)) or 'none'})")
    given: Counter[str] = Counter()
    wrong: dict[str, list[Any]] = {}
    for row in readable:
        for key, value in row.values.items():
            if key in COLUMNS and value is not None:
                given[key] += 1
                try:
                    COLUMNS[key].parse(value)
                except Mistyped:
                    wrong.setdefault(key, []).append(value)
    for key, values in wrong.items():
        if len(values) == given[key]:
            raise ValueError(
                f"{name}: column '{key}' has type {_json_type(values[0])} (such as {shown(values[0])}); "
                f"legal: {COLUMNS[key].type} ({COLUMNS[key].legal})"
            )
    return _parsed_lines(fs, path, name)


def _parsed_lines(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    with io.TextIOWrapper(fs.open_input_stream(path), encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _parse_line(name, number, line)


def _parse_line(name: str, number: int, line: str) -> RawRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RawRow(name, number, {}, unreadable=f"not JSON ({error})")
    if not isinstance(values, dict):
        return RawRow(name, number, {}, unreadable=f"a JSON {_json_type(values)}, not an object")
    if set(values) == {UNREADABLE}:
        return RawRow(name, number, {}, unreadable=str(values[UNREADABLE]))
    duplicate = values.pop(DUPLICATE, False) is True
    return RawRow(name, number, values, duplicate=duplicate)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")
