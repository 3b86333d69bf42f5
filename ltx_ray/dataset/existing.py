"""What a dataset has already, known from the keys of its rows: 24 bytes a finished row."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.layout import row_key
from ltx_ray.dataset.parts import (
    ITEM_BYTES,
    KEY_BYTES,
    UnreadablePart,
    key_bytes,
    keys_of,
    list_segments,
    read_keys,
    read_segment,
    segment_table,
    unreadable,
)
from ltx_ray.dataset.removed import RemovedRows, read_removed
from ltx_ray.dataset.stored_latents import StoredLatents
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

T = TypeVar("T")

#: Names that become keys at once, and bytes of records that are sorted at once.
_BATCH, _PIECE_BYTES = 1 << 17, 1 << 23
#: Threads that read parts and segments: few on a disk, where they would wait for each other, and hold memory meanwhile.
_THREADS, _LOCAL_THREADS = 16, 4
#: The number of a part that stands for all parts of one row, whose names follow from their rows.
_OF_ONE_ROW = (1 << 32) - 1
#: Columns that say which row has failed, and how.
FAILURE_COLUMNS = ("item_id", "id", "source", "error_class")
_KINDS = (layout.ROW, layout.INFRASTRUCTURE, layout.ILLEGAL, layout.UNREAD)


class TableRows:
    """Rows of index/ or previews/: which there are, and which part or segment has them.

    A row is folded when a part has it, and pending when only a segment does. One thread may change this while others
    look rows up.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        #: Records of a row's key and the number of its part in `_parts`.
        self._folded = IdTable(KEY_BYTES + 4, cap=None)
        self._parts: list[str] = []
        #: By the first 8 bytes of its item_id: the rest of a pending row's key, and the path of its segment.
        self._pending: dict[bytes, tuple[tuple[bytes, str], ...]] = {}
        self._pending_count = 0
        self._next: dict[str, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._folded) + self._pending_count

    @property
    def pending_count(self) -> int:
        return self._pending_count

    def has(self, key: bytes) -> bool:
        with self._lock:
            return self._place(key) is not None

    def not_folded(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of the keys that no part has."""
        with self._lock:
            maybe = self._folded.settled([key[:8] for key in keys])
            return [key for key in keys if key[:8] not in maybe or self._folded_number(key) is None]

    def path_of(self, key: bytes) -> str | None:
        """Path of the part or segment that has the row."""
        with self._lock:
            return self._place(key)

    def paths_of(self, key: bytes) -> list[str]:
        """Paths of all parts that have the row. It should be one."""
        numbers = (int.from_bytes(rest[12:], "big") for rest in self._folded.rests(key[:8]) if rest[:12] == key[8:])
        return [self._path(key, number) for number in numbers]

    def key_of(self, item_id: str) -> str | None:
        """The key of some row of the item."""
        item = bytes.fromhex(item_id)
        head, tail = item[:8], item[8:]
        with self._lock:
            for rest, _ in self._pending.get(head, ()):
                if rest[:8] == tail:
                    return rest[8:].hex()
            for rest in self._folded.rests(head):
                if rest[:8] == tail:
                    return rest[8:12].hex()
        return None

    def parts_of_item(self, item: bytes) -> set[str]:
        """Paths of the parts that have rows of an item (16 bytes)."""
        rests = (rest for rest in self._folded.rests(item[:8]) if rest[:8] == item[8:])
        return {self._path(item + rest[8:12], int.from_bytes(rest[12:], "big")) for rest in rests}

    def _place(self, key: bytes) -> str | None:
        for rest, segment in self._pending.get(key[:8], ()):
            if rest == key[8:]:
                return segment
        number = self._folded_number(key)
        return None if number is None else self._path(key, number)

    def _path(self, key: bytes, number: int) -> str:
        if number == _OF_ONE_ROW:
            return f"{self.folder}/{layout.one_row_part(key[:ITEM_BYTES].hex(), key[ITEM_BYTES:].hex())}"
        return f"{self.folder}/{self._parts[number]}"

    def _folded_number(self, key: bytes) -> int | None:
        for rest in self._folded.rests(key[:8]):
            if rest[:12] == key[8:]:
                return int.from_bytes(rest[12:], "big")
        return None

    # --- changes ---------------------------------------------------------------------------------

    def load(self, parts: Iterable[tuple[str | None, bytes]]) -> None:
        """Take in the keys of many parts; the name None stands for parts of one row."""
        self._folded.load(_pieces(self._records(name, keys) for name, keys in parts))

    def fold(self, name: str, keys: Sequence[bytes]) -> None:
        """The part `name` has rows now that no other part has."""
        with self._lock:
            self._folded.extend(self._records(name, b"".join(keys)))
            self._forget_pending(keys)

    def add_pending(self, keys: Iterable[bytes], segment: str) -> None:
        with self._lock:
            for key in keys:
                if self._place(key) is None:
                    older = self._pending.get(key[:8], ())
                    self._pending[key[:8]] = (*older, (key[8:], segment))
                    self._pending_count += 1

    def drop_pending(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._forget_pending(keys)

    def _forget_pending(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            found = self._pending.pop(key[:8], ())
            left = tuple(entry for entry in found if entry[0] != key[8:])
            self._pending_count -= len(found) - len(left)
            if left:
                self._pending[key[:8]] = left

    def _records(self, name: str | None, keys: bytes) -> bytes:
        number = _OF_ONE_ROW if name is None else len(self._parts)
        if name is not None:
            self._parts.append(name)
            self.saw(name)
        rows = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        ends = np.broadcast_to(np.frombuffer(number.to_bytes(4, "big"), np.uint8), (len(rows), 4))
        return np.hstack([rows, ends]).tobytes()

    # --- numbers of parts ------------------------------------------------------------------------

    def saw(self, name: str) -> None:
        """There is a part of this name, and so its number is taken."""
        if match := layout.NUMBERED_PART.fullmatch(name):
            dataset, number = match.groups()
            self._next[dataset] = max(self._next.get(dataset, 0), int(number) + 1)

    def next_number(self, dataset: str) -> int:
        """The number after the highest that was seen. A number that is free below it is not used again."""
        return self._next.get(dataset, 0)

    def look_up(self, item_heads: Sequence[bytes]) -> ItemLookup:
        """Which of many items may have rows here, by the first 8 bytes of their item_ids."""
        return ItemLookup(self._folded, self._pending, item_heads)


class ItemLookup:
    """Says for a batch of items whether they can have finished rows: one search instead of one for each item."""

    def __init__(self, folded: IdTable, pending: dict[bytes, tuple[tuple[bytes, str], ...]], heads: Sequence[bytes]):
        self._folded, self._pending = folded, pending
        self._version = folded.version
        self._settled = folded.settled(heads)

    def may_have_rows(self, item_head: bytes) -> bool:
        """False when no item with this head (one of the batch's) has a row by now."""
        return item_head in self._settled or item_head in self._pending or self._version != self._folded.version


class FailedRows:
    """Rows of failed/: 21 bytes each. A row is known by its item, or what `unplanned_item` gives, and its key."""

    def __init__(self) -> None:
        #: Records of a row's key (8 hex digits), its item and its kind. Rows of one key are looked up together.
        self._table = IdTable(KEY_BYTES + 1, head=KEY_BYTES - ITEM_BYTES, cap=None)
        self._dropped: set[bytes] = set()
        self._lock = threading.Lock()
        #: Number of failed rows by kind: "row" (their own fault), "infra", "illegal" and "unread".
        self.kinds: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.kinds.total()

    def load(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Take in many rows, of which none may come twice: (kind, key)."""

        def records() -> Iterator[bytes]:
            for kind, key in rows:
                self.kinds[kind] += 1
                yield _failed_record(kind, key)

        self._table.load(_pieces(records()))

    def add(self, kind: str, key: bytes) -> None:
        """The row has failed, whether or not it had before."""
        record = _failed_record(kind, key)
        with self._lock:
            self._drop(key)
            self._dropped.discard(record)
            if self._kind_of(key) is None:
                self._table.put(record[:4], record[4:])
                self._table.settle()
            self.kinds[kind] += 1

    def drop(self, key: bytes) -> None:
        """The row's failure was overcome."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if (kind := self._kind_of(key)) is not None:
            self._dropped.add(_failed_record(kind, key))
            self.kinds[kind] -= 1

    def kind_of(self, key: bytes) -> str | None:
        with self._lock:
            return self._kind_of(key)

    def _kind_of(self, key: bytes) -> str | None:
        return next((kind for item, kind in self._of_key(key[ITEM_BYTES:]) if item == key[:ITEM_BYTES]), None)

    def of_key(self, key: str) -> list[tuple[str, str]]:
        """(item_id, kind) of each failure of rows with this key."""
        with self._lock:
            return [(item.hex(), kind) for item, kind in self._of_key(bytes.fromhex(key))]

    def _of_key(self, key: bytes) -> Iterator[tuple[bytes, str]]:
        for rest in self._table.rests(key):
            if key + rest not in self._dropped:
                yield rest[:ITEM_BYTES], _KINDS[rest[ITEM_BYTES]]


def _failed_record(kind: str, key: bytes) -> bytes:
    return key[ITEM_BYTES:] + key[:ITEM_BYTES] + bytes([_KINDS.index(kind)])


def unplanned_item(source: str | None, row_id: str | None) -> str:
    """32 hex digits in place of an item_id, for a row that has none."""
    return hashlib.sha256(f"{source}\0{row_id or ''}".encode("utf-8", "surrogatepass")).hexdigest()[: 2 * ITEM_BYTES]


def failure_of(
    item_id: str | None, row_id: str | None, source: str | None, error_class: str | None
) -> tuple[str, bytes]:
    """Kind and key of a row of failed/, from its FAILURE_COLUMNS. One without an item is known by its place."""
    kind = layout.ROW if error_class == "row" else layout.INFRASTRUCTURE
    if item_id is None:
        kind = layout.ILLEGAL if kind == layout.ROW else layout.UNREAD
        return kind, key_bytes(unplanned_item(source, row_id), row_key(source))
    return kind, key_bytes(item_id, row_key(row_id))


def failures_of(table: pa.Table) -> list[tuple[str, bytes]]:
    """`failure_of` for each row of a table."""
    return [failure_of(*row) for row in zip(*(table[name].to_pylist() for name in FAILURE_COLUMNS), strict=True)]


class ExistingRows:
    """Finished and failed rows of a dataset, and the items with stored latents or previews.

    An item is named by its item_id (32 hex digits), a row by its item and its key (8 hex digits, `layout.row_key`).
    """

    def __init__(self, store: Store | None = None) -> None:
        self.index, self.previews = TableRows(layout.INDEX), TableRows(layout.PREVIEWS)
        self.failed = FailedRows()
        #: What was taken down and is not to be rendered again.
        self.removed = RemovedRows()
        #: Segments that were read, and those that are damaged.
        self.segments: list[str] = []
        self.damaged: list[UnreadablePart] = []
        self.latents = StoredLatents(store)

    def table(self, name: str) -> TableRows:
        return self.index if name == layout.INDEX else self.previews

    @property
    def row_count(self) -> int:
        return len(self.index)

    @property
    def pending_count(self) -> int:
        """Finished rows that are in no part yet."""
        return self.index.pending_count + self.previews.pending_count

    @property
    def failed_count(self) -> int:
        return len(self.failed)

    @property
    def may_have_failures(self) -> bool:
        """Whether there may be failed rows. It is asked for every row of a plan, so nothing is counted."""
        return bool(self.failed.kinds)

    @property
    def failed_kinds(self) -> Counter[str]:
        return self.failed.kinds

    @property
    def preview_count(self) -> int:
        return len(self.previews)

    @property
    def has_noise(self) -> bool:
        """Whether there are clips, previews or stored latents, or a failed row's latents may be on some node."""
        return (
            bool(self.row_count or self.preview_count or self.failed_kinds[layout.INFRASTRUCTURE]) or self.latents.any
        )

    def has_row(self, item_id: str, key: str) -> bool:
        return self.index.has(key_bytes(item_id, key))

    def key_of(self, item_id: str) -> str | None:
        """The key of some finished row of the item."""
        return self.index.key_of(item_id)

    def failure(self, item_id: str, key: str) -> str | None:
        """The kind of the row's failure ("row" or "infra"); None when it has not failed."""
        return self.failed.kind_of(key_bytes(item_id, key))

    def failures_of_key(self, key: str) -> list[tuple[str, str]]:
        """(item_id, kind) of each failure of rows with this key."""
        return self.failed.of_key(key)

    def has_latents(self, item_id: str) -> bool:
        return self.latents.has(item_id)

    def has_preview(self, item_id: str, key: str) -> bool:
        return self.previews.has(key_bytes(item_id, key))

    def preview_of(self, item_id: str) -> str | None:
        """The key of some row of the item that has a preview."""
        return self.previews.key_of(item_id)

    def look_up(self, item_heads: Sequence[bytes]) -> ItemLookup:
        """Which of many items may have finished rows here, by the first 8 bytes of their item_ids."""
        return self.index.look_up(item_heads)


def list_existing(
    store: Store, say: Callable[[str], None] = lambda message: None, *, one_row_parts: bool = True
) -> ExistingRows:
    """List the finished and failed rows of a dataset and its previews.

    Without `one_row_parts`, rows in parts of earlier versions are left out, because they are about to be moved.

    A part that is none of the dataset's own, such as a copy, is read, too, because readers of the folder see it; one
    that cannot be read is named by `say` and passed over. Raises UnreadablePart for a damaged part of the dataset.
    """
    existing = ExistingRows(store)
    existing.removed = read_removed(store)
    # Segments are read before parts are listed: a row moves from a segment to a part, and so is seen in one at least.
    segments = _read_segments(store, existing)
    _load(store, existing.index, store.names(layout.INDEX), say, one_row_parts)
    # previews/ has the folders of its clips beside the parts
    _load(store, existing.previews, iter(store.list_names(layout.PREVIEWS)), say, one_row_parts)
    _load_failed(store, existing.failed)
    for path, table in segments:
        if segment_table(path) != layout.FAILED:
            existing.table(segment_table(path)).add_pending(keys_of(table), path)
            continue
        for (kind, key), mark in zip(failures_of(table), table["mark"].to_pylist(), strict=True):
            if mark is None:
                existing.failed.add(kind, key)
            elif mark == layout.OVERCOME:
                existing.failed.drop(key)
    return existing


def _read_segments(store: Store, existing: ExistingRows) -> list[tuple[str, pa.Table]]:
    def read(path: str) -> tuple[str, pa.Table] | UnreadablePart | None:
        try:
            return path, read_segment(store, path)
        except FileNotFoundError:
            return None  # It was folded meanwhile.
        except UnreadablePart as damage:
            return damage

    with _pool(store) as pool:
        found = list(pool.map(read, list_segments(store)))
    existing.damaged = [one for one in found if isinstance(one, UnreadablePart)]
    segments = [one for one in found if isinstance(one, tuple)]
    existing.segments = [path for path, _ in segments]
    return segments


def _load(store: Store, rows: TableRows, names: Iterator[str], say: Callable[[str], None], one_row_parts: bool) -> None:
    """Take in the keys of all parts among the `names` of a table's folder, which is listed once."""
    parts: list[str] = []

    def of_one_row() -> Iterator[str]:
        for name in names:
            if match := layout.PART.fullmatch(name):
                if one_row_parts:
                    yield "".join(match.groups())
            elif layout.is_visible(name) and name.endswith(".parquet"):
                parts.append(name)
                rows.saw(name)

    rows.load((None, bytes.fromhex("".join(batch))) for batch in _batches(of_one_row()))

    def keys(name: str) -> tuple[str, bytes] | None:
        try:
            return name, read_keys(store, f"{rows.folder}/{name}")
        except UnreadablePart as damage:
            if layout.NUMBERED_PART.fullmatch(name):
                raise
            say(str(damage))
            return None

    with _pool(store) as pool:
        rows.load(found for found in _in_order(pool, keys, sorted(parts)) if found is not None)


def _load_failed(store: Store, failed: FailedRows) -> None:
    parts: list[str] = []

    def of_one_row() -> Iterator[tuple[str, bytes]]:
        for name in store.names(layout.FAILED):
            if match := layout.FAILED_PART.fullmatch(name):
                kind, item_id, key = match.groups()
                yield kind, key_bytes(item_id, key)
            elif layout.NUMBERED_PART.fullmatch(name):
                parts.append(name)

    failed.load(of_one_row())

    def failures(name: str) -> list[tuple[str, bytes]]:
        path = f"{layout.FAILED}/{name}"
        try:
            return failures_of(store.read_columns(path, FAILURE_COLUMNS))
        except FileNotFoundError:
            return []  # All of its rows were rendered meanwhile.
        except (pa.ArrowException, ValueError) as error:
            raise unreadable(store, path, error) from None

    with _pool(store) as pool:
        failed.load(itertools.chain.from_iterable(_in_order(pool, failures, sorted(parts))))


def _pool(store: Store) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_LOCAL_THREADS if store.is_local else _THREADS)


def _in_order(pool: ThreadPoolExecutor, call: Callable[[str], T], names: list[str]) -> Iterator[T]:
    """`call` of each name, some ahead of what is taken."""
    for start in range(0, len(names), 4 * _THREADS):
        yield from pool.map(call, names[start : start + 4 * _THREADS])


def _pieces(records: Iterable[bytes]) -> Iterator[bytes]:
    """Records in pieces of _PIECE_BYTES or a little more."""
    piece: list[bytes] = []
    size = 0
    for record in records:
        piece.append(record)
        size += len(record)
        if size >= _PIECE_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
    if size:
        yield b"".join(piece)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        yield batch
