"""What was taken down: items and ids that are in the dataset no more and that no run renders again.

Each takedown has a record in state/removed/, which is created before anything is taken out. A second file says that
nothing of it is left.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.storage.locations import join
from ltx_ray.storage.store import Store

#: Bytes of an item_id, and those of an id's sha256 that a record has. Ids themselves may name a person.
_BYTES = 16
_RECORD = re.compile(r"([0-9]{8})\.json")
_DONE_ENDING = ".done"


@dataclass
class RemovedRows:
    """Items by their item_id (16 bytes), and ids by the first 16 bytes of their sha256."""

    items: set[bytes] = field(default_factory=set)
    ids: set[bytes] = field(default_factory=set)
    #: Paths of records of which something may be left.
    unfinished: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.items or self.ids)

    def has(self, item: bytes, id_digest: bytes) -> bool:
        """Whether a row is not to be rendered. `id_digest`: the sha256 of its id."""
        return item in self.items or id_digest[:_BYTES] in self.ids

    def has_row(self, item_id: str | None, row_id: str | None) -> bool:
        """The same for a row of a table. One that is no legal request has no item_id."""
        if item_id is not None and bytes.fromhex(item_id) in self.items:
            return True
        return row_id is not None and id_digest(row_id) in self.ids

    def left(self, rows: pa.Table) -> pa.Table:
        """Those of `rows`, which have an item_id and an id, that were not taken down."""
        if not self:
            return rows
        numbers = self.numbers_left(rows)
        return rows if len(numbers) == len(rows) else rows.take(pa.array(numbers, pa.int64()))

    def numbers_left(self, rows: pa.Table) -> list[int]:
        pairs = zip(rows["item_id"].to_pylist(), rows["id"].to_pylist(), strict=True)
        return [number for number, (item_id, row_id) in enumerate(pairs) if not self.has_row(item_id, row_id)]


def id_digest(row_id: str) -> bytes:
    return hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:_BYTES]


def read_removed(store: Store) -> RemovedRows:
    """What was taken down in the dataset so far. Raises OSError for a damaged record."""
    removed = RemovedRows()
    names = set(store.names(layout.REMOVED))
    for name in sorted(filter(_RECORD.fullmatch, names)):
        path = f"{layout.REMOVED}/{name}"
        try:
            fields = json.loads(store.read_bytes(path))
            removed.items.update(map(bytes.fromhex, fields["items"]))
            removed.ids.update(map(bytes.fromhex, fields["ids"]))
        except (ValueError, KeyError, TypeError):
            raise OSError(
                f"{join(store.name, path)}, which says what was taken down, is damaged; delete it, and run ltx-ray "
                f"remove again with the same ids"
            ) from None
        if f"{name}{_DONE_ENDING}" not in names:
            removed.unfinished.append(path)
    return removed


def record_removed(store: Store, items: Iterable[bytes], ids: Iterable[bytes]) -> RemovedRows:
    """Record a takedown, to be called under the lease; returns it as one of which something is left."""
    removed = RemovedRows(set(items), set(ids))
    fields = {"format": 1, "items": _sorted_hex(removed.items), "ids": _sorted_hex(removed.ids)}
    taken = [int(match[1]) for match in map(_RECORD.fullmatch, store.names(layout.REMOVED)) if match]
    number = max(taken, default=-1) + 1
    while not store.create(path := f"{layout.REMOVED}/{number:08d}.json", json.dumps(fields).encode()):
        number += 1
    removed.unfinished.append(path)
    return removed


def record_finished(store: Store, record: str) -> None:
    """Nothing of a takedown is left in the dataset. `record`: its path."""
    store.create(f"{record}{_DONE_ENDING}", b"{}")


def _sorted_hex(values: Iterable[bytes]) -> list[str]:
    return sorted(value.hex() for value in values)
