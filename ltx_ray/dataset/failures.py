"""failed/: what has failed and was not overcome since. Unlike index/, its parts change, under the lease."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import FAILURE_COLUMNS, ExistingRows, failure_of, failures_of
from ltx_ray.dataset.parts import (
    ITEM_BYTES,
    encode_part,
    key_bytes,
    read_part,
    take,
    unreadable,
)
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.locations import recorded, resolve, split_options
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store


class FailureScope:
    """The rows without an item, such as illegal ones, that a run over a whole manifest has found.

    Every other row of the manifest has an item now, so that its failure without one is overcome. When the manifest is
    this dataset's own failed/, its rows are those of every manifest.
    """

    def __init__(self, store: Store, manifest: str):
        self._place = place(recorded(manifest))
        self._every = Store(manifest).root == store.path(layout.FAILED)
        self._found = IdTable(ITEM_BYTES)

    def found(self, key: bytes) -> None:
        self._found.put(key[:8], key[8:ITEM_BYTES])
        self._found.settle()

    def overcome(self, source: str | None, key: bytes) -> bool:
        """Whether the illegal row at `source`, with this key, is legal by now or gone from the manifest."""
        if self._found.has(key[:8], key[8:ITEM_BYTES]):
            return False
        file = place((source or "").rpartition(":")[0])
        return self._every or file == self._place or file.startswith(self._place + "/")


def place(file: str) -> str:
    """The location of a manifest as `source` has it. A dataset may name it by a relative path."""
    try:
        return resolve(split_options(file)[0])
    except ValueError:
        return file


def place_of_row(source: str) -> str:
    """`source`, `<manifest>:<row>`, with the location of its manifest as `place` gives it."""
    file, colon, number = source.rpartition(":")
    return f"{place(file)}:{number}" if colon else source


def same_row(source: str, other: str) -> bool:
    return place_of_row(source) == place_of_row(other)


@dataclass
class _Judgement:
    """What becomes of a row of failed/."""

    existing: ExistingRows
    #: The newest failure of rows with new ones, as (segment, row); None for those that were overcome.
    newest: dict[bytes, tuple[int, int] | None]
    #: By a row's key: (source, item) of rows whose failures as other items were overcome.
    others: dict[bytes, list[tuple[str, bytes]]]
    scope: FailureScope | None

    @classmethod
    def of(cls, existing: ExistingRows, segments: list[pa.Table], scope: FailureScope | None) -> _Judgement:
        judgement = cls(existing, {}, {}, scope)
        for segment, table in enumerate(segments):
            marks, sources = table["mark"].to_pylist(), table["source"].to_pylist()
            for row, ((_, key), mark, source) in enumerate(zip(failures_of(table), marks, sources, strict=True)):
                if mark == layout.AS_OTHER_ITEMS:
                    judgement.others.setdefault(key[ITEM_BYTES:], []).append((source, key[:ITEM_BYTES]))
                else:
                    judgement.newest.pop(key, None)
                    judgement.newest[key] = (segment, row) if mark is None else None
        return judgement

    def stays(self, unplanned: bool, key: bytes, source: str | None) -> bool:
        """Whether an older failure is still one. `unplanned`: that of a row without an item."""
        if key in self.newest or self.existing.index.has(key):
            return False
        if any(item != key[:ITEM_BYTES] and same_row(place, source or "") for place, item in self._others(key)):
            return False
        return not (unplanned and self.scope is not None and self.scope.overcome(source, key))

    def _others(self, key: bytes) -> list[tuple[str, bytes]]:
        return self.others.get(key[ITEM_BYTES:], [])

    def new(self) -> list[tuple[int, int]]:
        """The failures that are to be added, as (segment, row)."""
        return [at for key, at in self.newest.items() if at is not None and not self.existing.index.has(key)]


@dataclass(frozen=True)
class FailedParts:
    """Where failures go: the dataset's id, who writes, and the rows of a part."""

    store: Store
    dataset: str
    writer: str
    part_rows: int


def fold_failures(
    parts: FailedParts, existing: ExistingRows, segments: list[pa.Table], thorough: bool, scope: FailureScope | None
) -> None:
    """Add the failures of `segments` to failed/, and take out what was overcome. To be called under the lease.

    Without `thorough`, failures of rows that have been rendered since may stay until later. It may be repeated after a
    crash at any of its steps.
    """
    segments = [existing.removed.left(segment) for segment in segments]
    judgement = _Judgement.of(existing, segments, scope)
    store, names = parts.store, list(parts.store.names(layout.FAILED))
    numbered = sorted(name for name in names if layout.NUMBERED_PART.fullmatch(name))
    new = judgement.new()
    own = (match for match in map(layout.NUMBERED_PART.fullmatch, numbered) if match and match[1] == parts.dataset)
    number = max((int(match[2]) + 1 for match in own), default=0)
    while new:
        chunk = itertools.groupby(new[: parts.part_rows], key=lambda at: at[0])
        rows = pa.concat_tables([take(segments[segment], [row for _, row in rows]) for segment, rows in chunk])
        path = f"{layout.FAILED}/{layout.part_name(parts.dataset, number)}"
        if store.create(path, encode_part(rows, layout.FAILED, parts.writer)):
            new = new[parts.part_rows :]
        number += 1
    # Only now: failures are in failed/ twice for a moment, and never in no place.
    if thorough or judgement.others or any(existing.failed.kind_of(key) for key in judgement.newest):
        seen = IdTable(ITEM_BYTES + 4)
        for name in reversed(numbered):  # of two failures of one row, which a crash may leave, the newer part's stays
            _replace(parts, name, judgement, seen)
        store.delete_many(f"{layout.FAILED}/{name}" for name in _overcome_of_one_row(store, names, judgement))
    for key, at in judgement.newest.items():
        if at is None or existing.index.has(key):
            existing.failed.drop(key)
        else:
            segment, row = at
            values = [segments[segment][column][row].as_py() for column in FAILURE_COLUMNS]
            existing.failed.add(failure_of(*values)[0], key)


def _replace(parts: FailedParts, name: str, judgement: _Judgement, seen: IdTable) -> None:
    """Take the rows that do not stay, and those that are in `seen`, out of a part; the rest are seen then."""
    store = parts.store
    path = f"{layout.FAILED}/{name}"
    while True:
        try:
            data, version = store.read_versioned(path)
        except FileNotFoundError:
            return
        try:
            table = read_parquet(data)
            places = table["item_id"].to_pylist(), table["source"].to_pylist()
            found = [(item is None, key, at) for (_, key), item, at in zip(failures_of(table), *places, strict=True)]
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise unreadable(store, path, error) from None
        left = [
            row
            for row, (unplanned, key, source) in enumerate(found)
            if judgement.stays(unplanned, key, source) and not seen.has(key[:8], key[8:])
        ]
        if len(left) == len(found):
            break
        if not left:
            store.delete(path)
            break
        if store.update(path, encode_part(take(table, left), layout.FAILED, parts.writer), version):
            break
    for row in left:
        key = found[row][1]
        seen.put(key[:8], key[8:])
    seen.settle()


def _overcome_of_one_row(store: Store, names: list[str], judgement: _Judgement) -> Iterator[str]:
    """Those of the parts of one row, which earlier versions wrote, whose failure is none any more."""
    illegal = {key[ITEM_BYTES:] for key in judgement.newest}
    for name in names:
        if (match := layout.FAILED_PART.fullmatch(name)) is None:
            continue
        kind, item_id, digits = match.groups()
        key = key_bytes(item_id, digits)
        illegal_row = kind == layout.ILLEGAL
        if not illegal_row and key[ITEM_BYTES:] not in judgement.others:
            if not judgement.stays(False, key, None):
                yield name
            continue
        if illegal_row and judgement.scope is None and key[ITEM_BYTES:] not in illegal:
            continue
        try:
            table = read_part(store, f"{layout.FAILED}/{name}", list(FAILURE_COLUMNS))
        except OSError:
            continue  # damaged, which `verify` finds, or gone
        # Its name has a digest of the row's content; here, an illegal row is known by its place.
        [(_, key)], [source] = failures_of(table), table["source"].to_pylist()
        if not judgement.stays(illegal_row, key, source):
            yield name
