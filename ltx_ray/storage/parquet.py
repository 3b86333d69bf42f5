"""Whole Parquet files, or some of their columns, read by the calling thread alone."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file's bytes, or these `columns` of it.

    Raises pa.ArrowException for a damaged file, and for one that lacks a column. Every text of the table is UTF-8.
    Damage inside a value shows where the file has checksums of its pages.

    The calling thread reads alone. A thread of Arrow's own keeps the file a moment longer than the read lasts, and
    giving up a Python object there aborts a process that is about to exit. `pyarrow.parquet.read_table` uses such
    threads in any case.
    """
    try:
        return read_parquet_file(pa.BufferReader(data), columns)
    except OSError as error:
        # The bytes are in memory. Arrow reports damaged pages and headers as errors of a disk all the same.
        raise pa.ArrowInvalid(str(error)) from None


def read_parquet_file(source: pa.NativeFile, columns: Sequence[str] | None = None) -> pa.Table:
    """The same of a file that Arrow itself has opened, of which no more is read than these columns.

    A Python object must not stand behind it. Raises OSError, too, for a damaged file.
    """
    try:
        with pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file:
            names = None if columns is None else list(columns)
            missing = [name for name in names or () if name not in file.schema_arrow.names]
            if missing:
                raise pa.ArrowInvalid(f"no column {missing[0]!r}")
            table = file.read(names, use_threads=False)
        table.validate(full=True)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(str(error)) from None
    return table
