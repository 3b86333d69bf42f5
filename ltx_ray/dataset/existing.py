"""What a dataset has already, known from the names of its files alone: 20 bytes a finished row."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pyarrow.fs as pafs

from ltx_ray.dataset import layout
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

#: Names that become records at once.
_BATCH = 1 << 16


class _IdPairs:
    """A set of (item_id, row key), or of item ids alone (key ""), as hex digits; stored as bytes."""

    def __init__(self, width: int):
        self.table = IdTable(width, cap=None)
        self.dropped: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self.table) - len(self.dropped)

    def load(self, pairs: Iterable[str]) -> None:
        """Add many pairs, each the digits of item_id and key in one string. No pair may come twice."""
        batch: list[str] = []
        for pair in pairs:
            batch.append(pair)
            if len(batch) == _BATCH:
                self.table.extend(bytes.fromhex("".join(batch)))
                batch.clear()
        if batch:
            self.table.extend(bytes.fromhex("".join(batch)))
        self.table.merge()

    def has(self, item_id: str, key: str = "") -> bool:
        record = bytes.fromhex(item_id + key)
        return self.table.has(record[:8], record[8:]) and (item_id, key) not in self.dropped

    def key_of(self, item_id: str) -> str | None:
        item_id_bytes = bytes.fromhex(item_id)
        for rest in self.table.rests(item_id_bytes[:8]):
            if rest[:8] == item_id_bytes[8:] and (item_id, key := rest[8:].hex()) not in self.dropped:
                return key
        return None

    def add(self, item_id: str, key: str) -> None:
        if (item_id, key) in self.dropped:
            self.dropped.remove((item_id, key))
        elif not self.has(item_id, key):
            record = bytes.fromhex(item_id + key)
            self.table.put(record[:8], record[8:])
            self.table.settle()

    def drop(self, item_id: str, key: str) -> None:
        if self.has(item_id, key):
            self.dropped.add((item_id, key))


class ExistingRows:
    """Finished and failed rows of a dataset, and the items with stored latents or previews.

    An item is named by its item_id (32 hex digits), a row by its item and its key (8 hex digits, `layout.row_key`).
    `add_row`, `drop_row`, `add_preview` and `add_failure` keep it up to date during a run; the rest is as listed.
    """

    def __init__(self) -> None:
        self._rows, self._previews, self._latents = _IdPairs(20), _IdPairs(20), _IdPairs(16)
        self._failed: dict[tuple[str, str], str] = {}
        self._failed_parts: dict[str, list[tuple[str, str]]] = {}
        #: Number of failed rows by kind: "row" (their own fault), "infra" and "illegal".
        self.failed_kinds: Counter[str] = Counter()

    @property
    def row_count(self) -> int:
        return len(self._rows)

    @property
    def failed_count(self) -> int:
        return len(self._failed)

    @property
    def preview_count(self) -> int:
        return len(self._previews)

    @property
    def latents_count(self) -> int:
        return len(self._latents)

    @property
    def has_noise(self) -> bool:
        """Whether there are clips, previews or stored latents, or a failed row's latents may be on some node."""
        stored = self.row_count + self.preview_count + self.latents_count
        return stored + self.failed_kinds[layout.INFRASTRUCTURE] > 0

    def has_row(self, item_id: str, key: str) -> bool:
        return self._rows.has(item_id, key)

    def key_of(self, item_id: str) -> str | None:
        """The key of some finished row of the item."""
        return self._rows.key_of(item_id)

    def add_row(self, item_id: str, key: str) -> None:
        self._rows.add(item_id, key)

    def drop_row(self, item_id: str, key: str) -> None:
        """Forget a finished row, whose part or clip turned out to be missing."""
        self._rows.drop(item_id, key)

    def failure(self, item_id: str, key: str) -> str | None:
        """The kind of the row's failure ("row", "infra" or "illegal"); None when it has not failed."""
        return self._failed.get((item_id, key))

    def failed_parts(self, key: str) -> list[tuple[str, str]]:
        """(item_id, kind) of each failure of rows with this key."""
        return self._failed_parts.get(key, [])

    def has_latents(self, item_id: str) -> bool:
        return self._latents.has(item_id)

    def has_preview(self, item_id: str, key: str) -> bool:
        return self._previews.has(item_id, key)

    def add_preview(self, item_id: str, key: str) -> None:
        self._previews.add(item_id, key)

    def preview_of(self, item_id: str) -> str | None:
        """The key of some row of the item that has a preview."""
        return self._previews.key_of(item_id)

    def add_failure(self, item_id: str, key: str, kind: str) -> None:
        if (item_id, key) not in self._failed:
            self._failed_parts.setdefault(key, []).append((item_id, kind))
            self._failed[item_id, key] = kind
            self.failed_kinds[kind] += 1

    def look_up(self, item_heads: Sequence[bytes]) -> ItemLookup:
        """Which of many items may have finished rows here, by the first 8 bytes of their item_ids."""
        return ItemLookup(self._rows.table, item_heads)


class ItemLookup:
    """Says for a batch of items whether they can have finished rows: one search instead of one for each item."""

    def __init__(self, rows: IdTable, item_heads: Sequence[bytes]):
        self._rows, self._settled, self._version = rows, rows.settled(item_heads), rows.version

    def may_have_rows(self, item_head: bytes) -> bool:
        """False when no item with this head (one of the batch's) has a row by now."""
        return item_head in self._settled or self._version != self._rows.version or self._rows.recent(item_head)


def list_existing(store: Store) -> ExistingRows:
    """List the finished and failed rows of a dataset, its previews and its latents. Other names are ignored.

    On a local disk names are taken one by one. An object store's listing is held in memory once.
    """
    existing = ExistingRows()
    existing._rows.load(_digits(layout.PART, _names(store, layout.INDEX)))
    existing._previews.load(_digits(layout.PART, _names(store, layout.PREVIEWS)))
    existing._latents.load(_digits(layout.LATENTS_FILE, _names(store, layout.LATENTS)))
    for name in _names(store, layout.FAILED):
        if match := layout.FAILED_PART.fullmatch(name):
            kind, item_id, key = match.groups()
            existing.add_failure(item_id, key, kind)
    return existing


def _digits(pattern: re.Pattern[str], names: Iterable[str]) -> Iterator[str]:
    return ("".join(match.groups()) for match in map(pattern.fullmatch, names) if match)


def _names(store: Store, folder: str) -> Iterator[str]:
    """Base names of the files below `folder`, at any depth; none when it does not exist."""
    if store.is_local:
        for _, _, files in os.walk(store.path(folder)):
            yield from files
    else:
        selector = pafs.FileSelector(store.path(folder), allow_not_found=True, recursive=True)
        yield from (info.base_name for info in store.fs.get_file_info(selector) if info.type == pafs.FileType.File)
