"""Checks a dataset: each row of the index against its clip, by sha256, and whether all tables can be read."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.parts import UnreadablePart, list_segments, one_line, read_part, read_segment, segment_table
from ltx_ray.dataset.repair import Repair
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

_THREADS = 8
#: Rows that are checked at once: enough for every thread.
_BATCH = 32 * _THREADS
_RENDER_AGAIN = "run ltx-ray verify --repair, then ltx-ray render: the row is rendered again"
_SET_ASIDE = "run ltx-ray verify --repair: it is set aside"
_ADOPT = "run ltx-ray verify --repair: it is set aside, and rows that no other part has stay"

#: A row of the index, by column.
IndexRow = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file of the dataset."""

    file: str
    #: The id of its row; None where the row is not known.
    id: str | None
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}{f' ({self.id})' if self.id else ''}: {self.problem}; {self.remedy}"


@dataclass
class CheckedPart:
    """A part or segment, and what is wrong with it."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    #: Numbers of its rows that are to be taken out.
    bad_rows: set[int] = field(default_factory=set)
    #: Clips of theirs that are no whole ones of theirs any more.
    bad_clips: set[str] = field(default_factory=set)
    #: It is none of the dataset's parts, though it can be read as one.
    foreign: bool = False

    def wrong(self, problem: str, remedy: str, row_id: str | None = None) -> CheckedPart:
        self.findings.append(Finding(self.path, row_id, problem, remedy))
        return self

    def wrong_row(self, number: int, row: IndexRow, problem: str, remedy: str) -> None:
        self.bad_rows.add(number)
        self.wrong(problem, remedy, row["id"])

    def taken_out(self, repair: Repair) -> tuple[int, str]:
        """Take out what is bad; the number of things that were set aside, and what was done, in words."""
        if self.bad_rows:
            return len(self.bad_rows), f"set aside in {repair.take_out_rows(self.path, self.bad_rows, self.bad_clips)}"
        if self.foreign:
            moved_to, stay = repair.adopt(self.path)
            return 1, f"set aside as {moved_to}; {stay} of its rows stay, which no other part has"
        return 1, f"set aside as {repair.take_out_part(self.path)}"


@dataclass
class DatasetCheck:
    """A pass over the files of a dataset. It keeps 200 bytes of a row in memory."""

    store: Store
    #: Rows to choose for rendering again.
    sample: int
    #: Called with the number of rows so far and with how many there are, again and again.
    on_rows: Callable[[int, int], None] = lambda done, total: None
    rows: int = 0
    clips: int = 0
    failed_rows: int = 0
    #: Rows in segments, and clips of which neither a part nor a segment has a row.
    pending: int = 0
    clips_without_row: int = 0
    #: Rows that have the id of another row, with other content.
    shared_ids: int = 0
    #: Short hashes of ids, and of ids with their items.
    _seen: set[int] = field(default_factory=set)
    #: Rows of index/, by the footers of its parts.
    _expected: int = 0
    #: Items that have a row, and those whose clip is that of a row.
    _items: IdTable = field(default_factory=lambda: IdTable(16))
    _good: IdTable = field(default_factory=lambda: IdTable(16))
    #: A heap of (negative hash of the item, part, row): the item with the largest hash is on top, and leaves first.
    _sampled: list[tuple[int, str, IndexRow]] = field(default_factory=list)

    def sampled_rows(self) -> list[tuple[str, IndexRow]]:
        """(part, row) of the items with the smallest hashes, which are spread over the dataset. One row an item."""
        return [(part, row) for _, part, row in sorted(self._sampled, key=lambda entry: entry[:2], reverse=True)]

    def parts(self) -> Iterator[CheckedPart]:
        """Check every part and segment, and count. The caller may repair one before it takes the next."""
        # `Store.names` passes over empty objects, which are no parts and which readers of the folder meet.
        names = list(filter(layout.is_visible, self.store.list_names(layout.INDEX)))
        self._expected = sum(self._row_count(name) for name in names)
        for name in names:
            yield self._index_part(name)
        for name in filter(layout.is_part, self.store.list_names(layout.PREVIEWS)):
            yield self._readable(f"{layout.PREVIEWS}/{name}", layout.PREVIEWS)
        for name in filter(layout.is_visible, self.store.list_names(layout.FAILED)):
            yield self._readable(f"{layout.FAILED}/{name}", layout.FAILED)
        for path in list_segments(self.store):
            yield self._segment(path)
        self._count_clips()

    # --- index/ ----------------------------------------------------------------------------------

    def _index_part(self, name: str) -> CheckedPart:
        part = CheckedPart(f"{layout.INDEX}/{name}")
        try:
            table = read_part(self.store, part.path)
        except UnreadablePart as damage:
            return part.wrong(f"cannot be read as Parquet ({one_line(damage.__context__ or damage)})", _SET_ASIDE)
        schema = table.schema.remove_metadata()
        expected = layout.index_schema(schema.names)
        if not schema.equals(expected):
            wrong = [c.name for c in expected if c.name not in schema.names or schema.field(c.name).type != c.type]
            what = ", ".join(wrong) or "more, or another order"
            return part.wrong(f"does not have the columns of an index ({what})", _SET_ASIDE)
        if (problem := _foreign(name, table)) is not None:
            part.foreign = True
            return part.wrong(problem, _ADOPT)
        number = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for batch in table.to_batches(_BATCH):
                rows = batch.to_pylist()
                for row, wrong_clip in zip(rows, pool.map(self._wrong_clip, rows), strict=True):
                    self._check_row(part, number, row, wrong_clip)
                    number += 1
                self.on_rows(self.rows, self._expected)
        return part

    def _row_count(self, name: str) -> int:
        """Rows of a part of index/, by its name or its footer; none of one that cannot be read."""
        if layout.PART.fullmatch(name):
            return 1
        try:
            with self.store.fs.open_input_file(self.store.path(f"{layout.INDEX}/{name}")) as file:
                return pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            return 0

    def _check_row(self, part: CheckedPart, number: int, row: IndexRow, wrong_clip: str | None) -> None:
        self.rows += 1
        if not row["id"] or not layout.ITEM_ID.fullmatch(row["item_id"] or ""):
            return part.wrong_row(number, row, "its row has no id or no item_id", _RENDER_AGAIN)
        self.clips += row["clip"] is not None
        of_row, of_id = _short_hash(f"{row['item_id']} {row['id']}"), _short_hash(row["id"])
        again, other = of_row in self._seen, of_id in self._seen and of_row not in self._seen
        self.shared_ids += other
        self._seen |= {of_row, of_id}
        _put(self._items, row["item_id"])
        if again:
            part.wrong_row(number, row, "the row is in another part too", _SET_ASIDE)
        elif wrong_clip is not None:
            part.wrong_row(number, row, wrong_clip, _RENDER_AGAIN)
            if row["clip"] == layout.clip_path(row["item_id"]) and not self._good.has(*_halves(row["item_id"])):
                part.bad_clips.add(row["clip"])
        elif row["clip"] is not None:
            _put(self._good, row["item_id"])
            if self.sample:
                self._consider(part, row)

    def _consider(self, part: CheckedPart, row: IndexRow) -> None:
        """Take the row into the sample if its item's hash is small enough."""
        rank = -_short_hash(row["item_id"])
        if len(self._sampled) == self.sample and rank <= self._sampled[0][0]:
            return
        if all(other != rank for other, *_ in self._sampled):
            add = heapq.heappush if len(self._sampled) < self.sample else heapq.heappushpop
            add(self._sampled, (rank, part.path, row))

    def _wrong_clip(self, row: IndexRow) -> str | None:
        """What is wrong with the clip of a row; None when it is the row's own, or when the row has none."""
        clip = row["clip"]
        if clip is None or not row["item_id"]:
            return None
        if clip != layout.clip_path(row["item_id"]):
            return f"its clip is {clip!r}, which is not that of its item"
        try:
            data = self.store.read_bytes(clip)
        except FileNotFoundError:
            return f"its clip {clip} is missing"
        if (sha256 := hashlib.sha256(data).hexdigest()) != row["clip_sha256"]:
            return f"its clip {clip} has sha256 {sha256}, the index has {row['clip_sha256']}"
        if row["item_id"].encode() not in data:
            return f"its clip {clip} is of another item: its metadata does not name {row['item_id']}"
        return None

    # --- the other tables, segments and clips ----------------------------------------------------

    def _readable(self, path: str, table: str) -> CheckedPart:
        part = CheckedPart(path)
        try:
            rows = read_part(self.store, path)
            if table == layout.FAILED:
                rows.select(layout.FAILED_SCHEMA.names)
                self.failed_rows += len(rows)
        except FileNotFoundError:
            return part  # A run has rendered its rows since.
        except (UnreadablePart, KeyError) as error:
            what = "failed rows" if table == layout.FAILED else "previews"
            why = one_line(error.__context__ or error)
            return part.wrong(f"cannot be read as a table of {what} ({why})", _SET_ASIDE)
        return part

    def _segment(self, path: str) -> CheckedPart:
        part = CheckedPart(path)
        try:
            rows = read_segment(self.store, path)
        except FileNotFoundError:
            return part  # It was folded meanwhile.
        except UnreadablePart as damage:
            return part.wrong(f"cannot be read ({one_line(damage.__context__ or damage)})", _SET_ASIDE)
        if segment_table(path) != layout.FAILED:
            self.pending += len(rows)
            for item_id in rows["item_id"].to_pylist():
                _put(self._items, item_id)
        return part

    def _count_clips(self) -> None:
        for name in self.store.names(layout.CLIPS):
            item_id = name.rpartition("/")[2].removesuffix(".mp4")
            if name.endswith(".mp4") and layout.ITEM_ID.fullmatch(item_id):
                self.clips_without_row += not self._items.has(*_halves(item_id))


def _halves(item_id: str) -> tuple[bytes, bytes]:
    item = bytes.fromhex(item_id)
    return item[:8], item[8:]


def _put(items: IdTable, item_id: str) -> None:
    if not items.has(*_halves(item_id)):
        items.put(*_halves(item_id))
        items.settle()


def _foreign(name: str, table: pa.Table) -> str | None:
    """Why a part is none that the dataset has written under its name; None for one of its own."""
    if layout.NUMBERED_PART.fullmatch(name):
        return None
    if len(table) == 1 and layout.PART.fullmatch(name):
        [item_id], [row_id] = table["item_id"].to_pylist(), table["id"].to_pylist()
        if not item_id or not row_id:
            return None  # which is said of its row
        if name == (expected := layout.one_row_part(item_id, layout.row_key(row_id))):
            return None
        return f"is not named after its row (that would be {expected})"
    if layout.PART.fullmatch(name):
        return f"holds {len(table)} rows, legal: 1"
    return "is no part that a run has written (a copy, or renamed?)"


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
