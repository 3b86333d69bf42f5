"""Parquet and JSON manifests as a stream of raw rows.

An unusable file is a ValueError before the first row. An unusable row is part of the stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ltx_ray.manifest.columns import COLUMNS, Mistyped, shown, written
from ltx_ray.manifest.files import JSON, ManifestFile, Skipped, list_files, one_file
from ltx_ray.manifest.json_rows import json_rows
from ltx_ray.manifest.parquet_rows import parquet_rows
from ltx_ray.manifest.raw import FOLDER, RawRow, RowSource
from ltx_ray.storage.locations import parent
from ltx_ray.storage.store import Store

#: Most Parquet rows that are converted at once.
_PARQUET_ROWS = 4096


@dataclass(frozen=True)
class Manifest:
    """A manifest whose files were found to be usable."""

    #: Its location, as messages have it.
    name: str
    _sources: tuple[RowSource, ...]
    _skipped: Skipped

    def rows(self, extra: bool = True) -> Iterator[RawRow]:
        """Its rows from the first on, each time. Raises OSError when a file cannot be read any longer.

        Without `extra`, Parquet columns that no request has are not read.
        """
        return itertools.chain.from_iterable(source.read(extra) for source in self._sources)

    @property
    def row_count(self) -> int | None:
        """How many rows it has, if its files say so, as those of Parquet do. Damaged files may have fewer."""
        counts = [source.count for source in self._sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def say_skipped(self, say: Callable[[str], None]) -> None:
        """Name what it leaves out of a folder, one sentence for each reason, and columns that may be misspelt."""
        for names, why in self._skipped.reasons():
            say(f"{self.name}: skipped {names} ({why})")
        for name in sorted(frozenset[str]().union(*(source.near_misses for source in self._sources))):
            say(f"{self.name}: column '{name}' is not '{written(name)}': it goes to extra, and changes no clip")


def read_manifest(uri: str) -> Iterator[RawRow]:
    """`open_manifest(uri).rows()`."""
    return open_manifest(uri).rows()


def open_manifest(uri: str) -> Manifest:
    """A file of JSON (.jsonl, .ndjson or .json, also compressed) or Parquet (.parquet, .pq), or a folder of such files.

    Raises ValueError for a manifest that is missing or unreadable, or that has no `prompt` column, two columns of one
    name, or a column of the wrong type.
    """
    store, skipped = Store(uri), Skipped()
    type_ = store.fs.get_file_info(store.root).type
    if type_ == pafs.FileType.NotFound:
        raise ValueError(f"{store.name}: no such manifest; legal: a .jsonl or .parquet file, or a folder of them")
    is_folder = type_ == pafs.FileType.Directory
    try:
        files = list_files(store, skipped) if is_folder else [one_file(store, store.name)]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{store.name}: cannot be read ({error})") from None
    sources = []
    for file in files:
        source = _source(store.fs, file)
        if isinstance(source, ValueError):
            if not (is_folder and file.form.ambiguous):
                raise source
            skipped.add(file.path.removeprefix(store.path()).lstrip("/"), str(source).removeprefix(f"{file.name}: "))
        else:
            sources.append(source)
    if not sources:
        left_out = "".join(f"; skipped {names} ({why})" for names, why in skipped.reasons())
        raise ValueError(f"{store.name}: holds no .parquet or .jsonl file{left_out}")
    return Manifest(store.name, tuple(sources), skipped)


def manifest_folder(uri: str) -> str:
    """The folder from which a manifest's relative image paths count."""
    store = Store(uri)
    if store.fs.get_file_info(store.root).type == pafs.FileType.Directory:
        return store.uri
    return parent(store.uri)


def _source(fs: pafs.FileSystem, file: ManifestFile) -> RowSource | ValueError:
    """The rows of a file, or the reason why the file is no manifest."""
    source = json_rows(fs, file) if file.form.kind == JSON else parquet_rows(fs, file, _PARQUET_ROWS)
    if isinstance(source, ValueError) or not file.folder_values:
        return source
    return replace(source, read=partial(_with_folder_values, source, file.folder_values))


# --- values in folders' names --------------------------------------------------------------------------------------


def _with_folder_values(source: RowSource, given: Mapping[str, Any], extra: bool) -> Iterator[RawRow]:
    """Rows with the values that their folders' names give them. Rows of a dataset's failed/ have theirs already."""
    for row in source.read(extra):
        if row.unreadable is not None or row.from_failed:
            yield row
            continue
        values = {**row.values}
        for key, value in given.items():
            own = values.setdefault(key, value)
            if own is None:
                values[key] = value
            elif own is not value and not _agree(key, own, value):
                why = f"{key} is {shown(own)} in the row and {shown(value)} in its folder's name"
                yield RawRow(row.file, row.number, {}, fault=FOLDER, unreadable=why)
                break
        else:
            yield row._replace(values=values)


def _agree(key: str, own: Any, given: Any) -> bool:
    if key not in COLUMNS or given is None:
        return str(own) == str(given)
    try:
        return COLUMNS[key].parse(own) == COLUMNS[key].parse(given)
    except Mistyped:
        return False
