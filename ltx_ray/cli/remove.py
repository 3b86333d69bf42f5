"""`ltx-ray remove`: takes rows down, for good."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.description import describe_dataset
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.fold import fold_dataset
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import KEY_COLUMNS, unreadable
from ltx_ray.dataset.removal import NamedFailures, OnParts, take_down, take_failures
from ltx_ray.dataset.removed import id_digest, record_removed
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.store import Store


@dataclass(frozen=True)
class Removal:
    """What a removal did: rows and items that are gone, and the ids of which the dataset had no row."""

    rows: int
    items: int
    unknown: frozenset[str]

    @property
    def some_unknown(self) -> str:
        """A few of the unknown ids, for a message."""
        return ", ".join(sorted(self.unknown)[:10])


def remove(store: Store, ids: frozenset[str], say: Callable[[str], None], on_parts: OnParts) -> Removal:
    """Take down the rows with these ids, and all rows that share their clips. No run renders them again.

    An id is that of a row, or an item_id. Waits while a run is at work. Raises UnreadablePart for a damaged part,
    ValueError for an output that cannot be written.
    """
    store.check_writable("OUTPUT")
    writer = f"remove-{secrets.token_hex(3)}"
    lease = Lease(store, writer)
    lease.acquire(say)
    try:
        existing = list_existing(store, say)
        fold_dataset(store, existing, dataset_id(store), writer, say)
        items, known = _items_of(store, existing, ids, on_parts)
        known_before = {row_id for row_id in ids if existing.removed.has_row(_item_id(row_id), row_id)}
        # An item that has no row yet is not rendered, either.
        named = items | {row_id for row_id in ids if _item_id(row_id)}
        record_removed(store, map(bytes.fromhex, named), map(id_digest, ids))
        # Together with what earlier removals may have left.
        existing = list_existing(store, say)
        rows = take_down(store, existing, existing.removed, on_parts)
        describe_dataset(store, list_existing(store, say), anew=True)
        return Removal(rows, len(items), ids - known - known_before)
    finally:
        lease.release()


def remove_failures(store: Store, names: frozenset[str], say: Callable[[str], None], on_parts: OnParts) -> Removal:
    """Take rows out of failed/ alone. Runs that have them later try them again.

    A name is the id of a row, its item_id, or its place as the column `source` has it. Raises what `remove` raises.
    """
    store.check_writable("OUTPUT")
    writer = f"remove-{secrets.token_hex(3)}"
    lease = Lease(store, writer)
    lease.acquire(say)
    try:
        fold_dataset(store, list_existing(store, say), dataset_id(store), writer, say)
        failures = NamedFailures(names)
        rows = take_failures(store, failures, on_parts)
        describe_dataset(store, list_existing(store, say), anew=True)
        return Removal(rows, 0, names - failures.known)
    finally:
        lease.release()


def _item_id(text: str) -> str | None:
    return text if layout.ITEM_ID.fullmatch(text) else None


def _items_of(
    store: Store, existing: ExistingRows, ids: frozenset[str], on_parts: OnParts
) -> tuple[set[str], set[str]]:
    """The item_ids of the rows that `ids` name, and those of `ids` that name a row."""
    items: set[str] = set()
    known: set[str] = set()
    paths = [f"{table}/{name}" for table in layout.PART_SCHEMAS for name in store.list_names(table)]
    paths = [path for path in paths if layout.is_part(path.rpartition("/")[2])]
    for done, path in enumerate(paths):
        on_parts(done, len(paths))
        try:
            rows = store.read_columns(path, KEY_COLUMNS)
        except FileNotFoundError:
            continue
        except (pa.ArrowException, ValueError) as error:
            raise unreadable(store, path, error) from None
        for item_id, row_id in zip(*(rows[name].to_pylist() for name in KEY_COLUMNS), strict=True):
            named = ids & {item_id, row_id}
            if named:
                known |= named
                if item_id is not None:
                    items.add(item_id)
    return items, known
