"""Rows of Parquet files, in batches that are bounded by bytes. What is damaged costs the rows that it belongs to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ltx_ray.manifest.columns import COLUMNS, arrow_type_fits, near_misses
from ltx_ray.manifest.files import ManifestFile
from ltx_ray.manifest.json_rows import json_type
from ltx_ray.manifest.raw import DAMAGE, FAILED_ROW_COLUMN, RawRow, RowSource, is_damage, stored_row
from ltx_ray.manifest.values import LARGEST_VALUE, Cells, cells_of, is_bytes, is_text

#: Bytes that are converted at once, and bytes of a column that are read ahead.
_BATCH_BYTES, _BUFFER = 1 << 24, 1 << 20
#: Rows by which the size of texts that are stored once and mean many rows is told.
_PROBE_ROWS = 16
#: Rows that are read at once where a file is damaged.
_SALVAGED_ROWS = 64
_SOURCE = "source"
#: Columns of failed/ and previews/ that make a manifest row.
_STORED = (FAILED_ROW_COLUMN, _SOURCE)
#: The cell of a row whose column is damaged there.
_DAMAGED: Any = object()


def parquet_rows(fs: pafs.FileSystem, file: ManifestFile, most_rows: int) -> RowSource:
    """The rows of a file, of which at most `most_rows` are read at once.

    Raises ValueError for a file that cannot be read, without a prompt column, or with a column of the wrong type.
    """
    try:
        # closed at once: a folder may have more files than a process may open
        with fs.open_input_file(file.path) as opened:
            parquet = pq.ParquetFile(opened)
            schema, count = parquet.schema_arrow, parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.name}: cannot be read as Parquet ({error})") from None
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{file.name}: has {names.count(name)} columns '{name}'; legal: one column of each name")
    if all(name in names and pa.types.is_string(schema.field(name).type) for name in _STORED):
        return RowSource(lambda extra: _failed_rows(fs, file, most_rows), count)
    if "prompt" not in names and "prompt" not in file.folder_values:
        raise ValueError(f"{file.name}: has no column 'prompt' (it has {', '.join(names) or 'none'})")
    for name in names:
        column, found = COLUMNS.get(name), schema.field(name).type
        if column is not None and not arrow_type_fits(column, found):
            raise ValueError(f"{file.name}: column '{name}' has type {found}; legal: {column.type} ({column.legal})")
    # Without any column the rows could not be counted. Folders' names may give them all that a request has.
    known = [name for name in names if name in COLUMNS or name in file.folder_values] or names[:1]
    read = lambda extra: _rows(fs, file, most_rows, names if extra else known, COLUMNS)  # noqa: E731
    return RowSource(read, count, near_misses(names))


def _failed_rows(fs: pafs.FileSystem, file: ManifestFile, most_rows: int) -> Iterator[RawRow]:
    """Rows of failed/ or previews/. They keep the place in their manifest, by which later runs recognize them."""
    for row in _rows(fs, file, most_rows, _STORED, _STORED):
        if row.unreadable is not None:
            yield row._replace(from_failed=True)
            continue
        name, _, number = (row.values[_SOURCE] or f"{file.name}:0").rpartition(":")
        place = name, int(number) if number.isdecimal() else 0
        try:
            values = json.loads(row.values[FAILED_ROW_COLUMN] or "")
        except (ValueError, RecursionError) as error:
            yield RawRow(*place, {}, unreadable=f"not JSON ({error})", from_failed=True)
            continue
        if isinstance(values, dict):
            yield stored_row(*place, values)
        else:
            yield RawRow(*place, {}, unreadable=f"a JSON {json_type(values)}, not an object", from_failed=True)


def _rows(
    fs: pafs.FileSystem, file: ManifestFile, most_rows: int, columns: Sequence[str], needed: Container[str]
) -> Iterator[RawRow]:
    """The rows of a file with these `columns`. A row that lacks one that is `needed` cannot be read."""
    done, after = 0, 0
    try:
        with fs.open_input_file(file.path) as opened:
            table = _Table(opened, columns, needed, most_rows)
            for groups in table.runs():
                after = done + table.count(groups)
                try:
                    for values, count in table.batches(groups):
                        yield from map(RawRow, itertools.repeat(file.name), itertools.count(done + 1), values)
                        done += count
                except Exception as error:
                    if not is_damage(error):
                        raise
                    rows = table.undamaged(groups, file.name, after - table.count(groups) + 1, error)
                    yield from (row for row in rows if row.number > done)
                done = after
    except Exception as error:
        if not is_damage(error):
            raise
        yield RawRow(file.name, done + 1, {}, fault=DAMAGE, unreadable=f"the rest of the file cannot be read ({error})")


class _Table:
    """An open Parquet file, of which some columns are read."""

    def __init__(self, file: pa.NativeFile, columns: Sequence[str], needed: Container[str], most_rows: int):
        # Without the buffer, whole columns of a row group are read at once and kept until the end of the file. Dates in
        # Spark's old format reach beyond the years that nanoseconds can count.
        options = {
            "pre_buffer": False, "buffer_size": _BUFFER, "coerce_int96_timestamp_unit": "us",
            "page_checksum_verification": True,
        }  # fmt: skip
        self._parquet = pq.ParquetFile(file, **options)
        schema, self._metadata, self._most_rows = self._parquet.schema_arrow, self._parquet.metadata, most_rows
        if not set(columns) <= set(schema.names):
            raise pa.ArrowInvalid("its columns have changed since the run began")
        # Arrow converts indices to the type that the writer had in memory, and fails when a text is not UTF-8.
        dictionaries = [field.name for field in schema if _is_dictionary_of_texts(field.type)]
        if dictionaries:
            self._parquet = pq.ParquetFile(file, metadata=self._metadata, read_dictionary=dictionaries, **options)
        self._columns, self._needed = list(columns), needed
        self._cells: dict[str, Cells] = {
            name: cells_of(schema.field(name).type, known=name in needed, integers=_holds_integers(name))
            for name in columns
        }

    def runs(self) -> Iterator[list[int]]:
        """Row groups that are read together: small ones, or a single one."""
        run: list[int] = []
        rows = size = 0
        for group in range(self._metadata.num_row_groups):
            more = self._metadata.row_group(group)
            if run and (rows + more.num_rows > self._most_rows or size + more.total_byte_size > _BATCH_BYTES):
                yield run
                run, rows, size = [], 0, 0
            run.append(group)
            rows, size = rows + more.num_rows, size + more.total_byte_size
        if run:
            yield run

    def count(self, groups: Sequence[int]) -> int:
        return sum(self._metadata.row_group(group).num_rows for group in groups)

    def batches(self, groups: Sequence[int]) -> Iterator[tuple[Iterator[dict[str, Any]], int]]:
        """(the values of some rows, how many)."""
        for batch in self._read(groups):
            columns = [cells(batch.column(name)) for name, cells in self._cells.items()]
            yield map(dict, map(zip, itertools.repeat(self._columns), zip(*columns, strict=True))), batch.num_rows

    def undamaged(self, groups: Sequence[int], file: str, number: int, error: Exception) -> Iterator[RawRow]:
        """Rows of damaged row groups, from `number` on. One row stands for all that in turn lack a needed column."""
        for group in groups:
            rows = self._metadata.row_group(group).num_rows
            columns = [self._column(group, rows, name) for name in self._cells]
            numbered = enumerate(zip(*columns, strict=True), number)
            for lost, part in itertools.groupby(numbered, key=lambda item: self._lost(item[1])):
                if lost is None:
                    for n, cells in part:
                        pairs = zip(self._cells, cells, strict=True)
                        yield RawRow(file, n, {name: None if cell is _DAMAGED else cell for name, cell in pairs})
                    continue
                numbers = [n for n, _ in part]
                why = f"column '{lost}' of rows {numbers[0]} to {numbers[-1]} cannot be read ({error})"
                yield RawRow(file, numbers[0], {}, fault=DAMAGE, unreadable=why)
            number += rows

    def _lost(self, cells: Sequence[Any]) -> str | None:
        """The first column of those in need whose cell is damaged."""
        pairs = zip(self._cells, cells, strict=True)
        return next((name for name, cell in pairs if cell is _DAMAGED and name in self._needed), None)

    def _column(self, group: int, rows: int, name: str) -> Iterator[Any]:
        """The cells of one column, as far as it can be read, and `_DAMAGED` for each of the others."""
        given = 0
        try:
            for batch in self._batches(_SALVAGED_ROWS, [group], [name]):
                for cell in self._cells[name](batch.column(name)):
                    given += 1
                    yield cell
        except Exception as error:
            if not is_damage(error):
                raise
        yield from itertools.repeat(_DAMAGED, rows - given)

    def _read(self, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
        rows = min(self._batch_rows(group) for group in groups)
        # all row groups are read as one
        return self._batches(rows, groups, self._columns)

    def _batches(self, rows: int, groups: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # A thread of Arrow's own keeps the file, which may be a Python object, a moment longer than the read lasts.
        # Giving it up there aborts a process that is about to exit.
        return self._parquet.iter_batches(rows, row_groups=list(groups), columns=list(columns), use_threads=False)

    def _batch_rows(self, group: int) -> int:
        """The rows that are read at once from a row group, by their bytes."""
        metadata = self._metadata.row_group(group)
        rows = max(1, metadata.num_rows)
        size = metadata.total_byte_size / rows
        chunks = (metadata.column(n) for n in range(metadata.num_columns))
        if rows > _PROBE_ROWS and any(map(_may_repeat_long_texts, chunks)):
            first = next(self._batches(_PROBE_ROWS, [group], self._columns))
            size = max(size, first.nbytes / first.num_rows)
        return max(1, min(self._most_rows, int(_BATCH_BYTES / max(1.0, size))))


def _holds_integers(name: str) -> bool:
    return name in COLUMNS and pa.types.is_integer(COLUMNS[name].type)


def _is_dictionary_of_texts(type_: pa.DataType) -> bool:
    return pa.types.is_dictionary(type_) and (is_text(type_.value_type) or is_bytes(type_.value_type))


def _may_repeat_long_texts(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether rows may share a long text that is stored once. Writers give no statistics of long texts."""
    if not chunk.has_dictionary_page or chunk.physical_type != "BYTE_ARRAY":
        return False
    known = chunk.is_stats_set and chunk.statistics.has_min_max
    return not known and chunk.total_uncompressed_size > LARGEST_VALUE
