"""Which files a manifest consists of, and which it leaves out and why.

A folder stands for the files below it. Folders named `key=value` give their rows a value, as Spark, DuckDB and pyarrow
write partitioned tables.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow.fs as pafs

from ltx_ray.manifest.columns import COLUMNS, Mistyped
from ltx_ray.manifest.outputs import names_of_an_output
from ltx_ray.manifest.text_values import json_value
from ltx_ray.storage.locations import is_utf8, join
from ltx_ray.storage.store import Store

JSON, PARQUET = "json", "parquet"
_ENDINGS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".parquet": PARQUET, ".pq": PARQUET}
#: Endings of compressed JSON, and Arrow's names of the codecs.
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
#: What such a folder's name has for a null.
_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
#: Bytes of a file called run.json by which it is told whether a run wrote it.
_LONGEST_RECORD = 1 << 20
#: Names that a note repeats.
_SHOWN = 3

NO_ENDING = "only names that end in .jsonl, .ndjson, .json (also .gz, .bz2, .zst), .parquet or .pq are read"
_HIDDEN = "names that begin with '.' or '_' are not read"
_OUTPUT = "written by a run"
_NO_FILE = "neither a file nor a folder"
_READ_ALREADY = "a link to a folder that is read already"
_NO_NAME = "keys with nothing between two slashes"
_NO_UTF8 = "names that are not UTF-8"


class Form(NamedTuple):
    """How a file's rows are written: JSON or PARQUET, and Arrow's name of the codec around it."""

    kind: str
    codec: str | None = None
    #: Whether the name ends in .json. Beside tables such a file often holds something else, which is no mistake.
    ambiguous: bool = False


def form_of(path: str) -> Form | None:
    """The form that the ending of `path` stands for, in any case. None when it is no manifest's."""
    stem, ending = os.path.splitext(path.lower())
    codec = _CODECS.get(ending)
    if codec is not None:
        ending = os.path.splitext(stem)[1]
    kind = _ENDINGS.get(ending)
    return None if kind is None or (codec and kind == PARQUET) else Form(kind, codec, ending == ".json")


@dataclass(frozen=True)
class ManifestFile:
    """A file of a manifest: its path in the file system, its name in messages, and what its folders' names say."""

    path: str
    name: str
    form: Form
    folder_values: Mapping[str, Any] = field(default_factory=dict)


class Skipped:
    """Names that a manifest leaves out, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, why: str) -> None:
        self._counts[why] += 1
        names = self._names.setdefault(why, [])
        if len(names) < _SHOWN:
            names.append(name.encode("utf-8", "backslashreplace").decode())

    def reasons(self) -> Iterator[tuple[str, str]]:
        """(some names, the reason) for each reason."""
        for why, names in self._names.items():
            more = self._counts[why] - len(names)
            yield ", ".join(names) + (f" and {more} more" if more else ""), why


def one_file(store: Store, name: str) -> ManifestFile:
    """The file `store.root`, which a person named. Raises ValueError."""
    form = form_of(store.root)
    if form is None:
        raise ValueError(f"{name}: not a manifest; legal: a name that ends in .jsonl, .ndjson, .json or .parquet")
    [values] = _typed([name], [_folder_texts(os.path.dirname(store.root))])
    return ManifestFile(store.root, name, form, values)


def list_files(store: Store, skipped: Skipped) -> list[ManifestFile]:
    """The manifest files below the folder `store.root`, in the order of their paths. Raises OSError and ValueError."""
    found: list[tuple[str, Form]] = []
    waiting, seen = [""], {_identity(store, "")}
    while waiting:
        below = waiting.pop()
        children = sorted(_entries(store, below))
        own = _own_names(store, below, children)
        for name, type_ in children:
            relative, is_folder, form = below + name, type_ == pafs.FileType.Directory, form_of(name)
            if not name:
                skipped.add(f"{relative}/", _NO_NAME)
            elif name in own:
                skipped.add(relative + "/" * is_folder, _OUTPUT)
            elif name.startswith((".", "_")):
                skipped.add(relative + "/" * is_folder, _HIDDEN)
            elif not is_utf8(name):
                skipped.add(relative + "/" * is_folder, _NO_UTF8)
            elif is_folder:
                identity = _identity(store, relative)
                if identity in seen:
                    skipped.add(f"{relative}/", _READ_ALREADY)
                else:
                    seen.add(identity)
                    waiting.append(f"{relative}/")
            elif type_ != pafs.FileType.File:
                skipped.add(relative, _NO_FILE)
            elif form is None:
                skipped.add(relative, NO_ENDING)
            else:
                found.append((relative, form))
    found.sort()
    above = _folder_texts(store.root)
    texts = [above | _folder_texts(os.path.dirname(relative), whole=True) for relative, _ in found]
    names = [join(store.name, relative) for relative, _ in found]
    return [
        ManifestFile(store.path(relative), name, form, values)
        for (relative, form), name, values in zip(found, names, _typed(names, texts), strict=True)
    ]


# --- folders -----------------------------------------------------------------------------------------------------


def _entries(store: Store, below: str) -> Iterator[tuple[str, pafs.FileType]]:
    """Names in the folder `below` ("" or "a/b/") of the store, and what they are, links followed."""
    folder = store.path(below).rstrip("/") or "/"
    if not store.is_local:
        infos = store.fs.get_file_info(pafs.FileSelector(folder))
        # the key a//b is listed below a as a folder that has no name, and pyarrow cannot open it
        yield from ((info.base_name * (info.path == f"{folder}/{info.base_name}"), info.type) for info in infos)
        return
    # pyarrow fails on names that are not UTF-8
    with os.scandir(folder) as entries:
        for entry in entries:
            type_ = pafs.FileType.Unknown
            if entry.is_dir():
                type_ = pafs.FileType.Directory
            elif entry.is_file():
                type_ = pafs.FileType.File
            yield entry.name, type_


def _identity(store: Store, relative: str) -> Any:
    """What two links to one folder have in common."""
    path = store.path(relative)
    return os.path.realpath(path) if store.is_local else path


def _own_names(store: Store, below: str, children: Sequence[tuple[str, pafs.FileType]]) -> frozenset[str]:
    """The names in a folder that a run wrote there."""

    def read(name: str) -> bytes:
        with store.fs.open_input_file(store.path(below + name)) as file:
            return file.read(_LONGEST_RECORD)

    return names_of_an_output(
        [name for name, type_ in children if type_ == pafs.FileType.Directory],
        [name for name, type_ in children if type_ == pafs.FileType.File],
        read,
        lambda folder: (name for name, _ in _entries(store, f"{below}{folder}/")),
    )


# --- values in folders' names --------------------------------------------------------------------------------------


def _folder_texts(path: str, whole: bool = False) -> dict[str, str | None]:
    """The values in the names of the folders of `path`: of all of them, or of those at its end up to one without."""
    texts: dict[str, str | None] = {}
    for part in reversed(path.split("/")):
        key, equals, text = part.partition("=")
        if key and equals:
            texts.setdefault(unquote(key), None if text == _NULL else unquote(text, errors="surrogateescape"))
        elif not whole:
            break
    return dict(reversed(texts.items()))


def _typed(names: Sequence[str], texts: Sequence[Mapping[str, str | None]]) -> list[dict[str, Any]]:
    """`texts` (of each file in `names`) with values of the columns' types.

    An unknown column holds whole numbers when all of its values are written as such. Raises ValueError.
    """
    numbers = {key for folders in texts for key in folders} - {
        key for folders in texts for key, text in folders.items() if text is not None and not _INTEGER.fullmatch(text)
    }
    return [
        {key: _value(name, key, text, key in numbers) for key, text in folders.items()}
        for name, folders in zip(names, texts, strict=True)
    ]


def _value(name: str, key: str, text: str | None, integer: bool) -> Any:
    if text is None or key not in COLUMNS:
        return int(text) if text is not None and integer else text
    column = COLUMNS[key]
    try:
        value = json_value(column.type, text)
        if isinstance(value, float) and math.isnan(value):
            return None
        column.parse(value)
    except Mistyped:
        raise ValueError(
            f"{name}: its folder '{key}={text}' gives column '{key}' no value of its type; "
            f"legal: {column.type} ({column.legal})"
        ) from None
    return value
