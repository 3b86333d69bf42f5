"""What a dataset has already, from the names of its parts alone: 20 bytes a finished row."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pyarrow.fs as pafs

from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

_ITEM, _KEY = "([0-9a-f]{32})", "([0-9a-f]{8})"
_PART = re.compile(rf"part-{_ITEM}-{_KEY}\.parquet")
_FAILED_PART = re.compile(rf"part-(row|infra|illegal)-{_ITEM}-{_KEY}\.parquet")
_LATENTS = re.compile(rf"{_ITEM}\.safetensors")
#: Names that become records together.
_TOGETHER = 1 << 16


class _Pairs:
    """A set of (item_id, row key), or of item ids alone (key ""): hex digits outside, bytes inside."""

    def __init__(self, width: int):
        self.records = IdTable(width, cap=None)
        self.dropped: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self.records) - len(self.dropped)

    def load(self, digits: Iterable[str]) -> None:
        """Take many pairs, each as the digits of both, none of them twice."""
        waiting: list[str] = []
        for pair in digits:
            waiting.append(pair)
            if len(waiting) == _TOGETHER:
                self.records.extend(bytes.fromhex("".join(waiting)))
                waiting.clear()
        if waiting:
            self.records.extend(bytes.fromhex("".join(waiting)))
        self.records.merge()

    def has(self, item_id: str, key: str = "") -> bool:
        name = bytes.fromhex(item_id + key)
        return self.records.has(name[:8], name[8:]) and (item_id, key) not in self.dropped

    def key_of(self, item_id: str) -> str | None:
        name = bytes.fromhex(item_id)
        for rest in self.records.rests(name[:8]):
            if rest[:8] == name[8:] and (item_id, key := rest[8:].hex()) not in self.dropped:
                return key
        return None

    def add(self, item_id: str, key: str) -> None:
        if (item_id, key) in self.dropped:
            self.dropped.remove((item_id, key))
        elif not self.has(item_id, key):
            name = bytes.fromhex(item_id + key)
            self.records.put(name[:8], name[8:])
            self.records.settle()

    def drop(self, item_id: str, key: str) -> None:
        if self.has(item_id, key):
            self.dropped.add((item_id, key))


class ExistingRows:
    """Finished and failed rows of a dataset, and the items with stored latents or previews.

    An item is named by 32 hex digits, a row of it by the 8 of its key. `add_row` and `drop_row` keep the rows
    true while a run goes on; the rest is as it was listed.
    """

    def __init__(self) -> None:
        self._rows, self._previews, self._latents = _Pairs(20), _Pairs(20), _Pairs(16)
        self._failed: dict[tuple[str, str], str] = {}
        self._failed_parts: dict[str, list[tuple[str, str]]] = {}
        #: Failed rows by "row" (their own fault), "infra" and "illegal".
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

    def has_row(self, item_id: str, key: str) -> bool:
        return self._rows.has(item_id, key)

    def key_of(self, item_id: str) -> str | None:
        """The key of some finished row of the item."""
        return self._rows.key_of(item_id)

    def add_row(self, item_id: str, key: str) -> None:
        self._rows.add(item_id, key)

    def drop_row(self, item_id: str, key: str) -> None:
        """Forget a finished row: what it stands for turned out to be missing."""
        self._rows.drop(item_id, key)

    def failure(self, item_id: str, key: str) -> str | None:
        """ "row", "infra" or "illegal"; None for a row that has not failed."""
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

    def known(self, heads: Sequence[bytes]) -> Known:
        """Which of many items may have rows here, by the first 8 bytes of their ids."""
        return Known(self._rows.records, heads)


class Known:
    """Says for a batch of items whether asking Done for rows can find any: one search in place of one for each."""

    def __init__(self, rows: IdTable, heads: Sequence[bytes]):
        self._rows, self._settled, self._version = rows, rows.settled(heads), rows.version

    def may_have(self, head: bytes) -> bool:
        """False when no item with this head has a row now."""
        return head in self._settled or self._version != self._rows.version or self._rows.recent(head)


def list_existing(store: Store) -> ExistingRows:
    """What is done and what has failed. Names that are not ours are passed over.

    On a local disk names are taken one by one; an object store's listing passes through memory once.
    """
    done = ExistingRows()
    done._rows.load(_digits(_PART, _names(store, "index")))
    done._previews.load(_digits(_PART, _names(store, "previews")))
    done._latents.load(_digits(_LATENTS, _names(store, "latents")))
    for name in _names(store, "failed"):
        if match := _FAILED_PART.fullmatch(name):
            kind, item_id, key = match.groups()
            done.add_failure(item_id, key, kind)
    return done


def _digits(pattern: re.Pattern[str], names: Iterable[str]) -> Iterator[str]:
    return ("".join(match.groups()) for match in map(pattern.fullmatch, names) if match)


def _names(store: Store, folder: str) -> Iterator[str]:
    """Names, without folders, of the files below `folder`; none when it does not exist."""
    if store.is_local:
        for _, _, files in os.walk(store.path(folder)):
            yield from files
    else:
        selector = pafs.FileSelector(store.path(folder), allow_not_found=True, recursive=True)
        yield from (info.base_name for info in store.fs.get_file_info(selector) if info.type == pafs.FileType.File)
