"""Checks a dataset: each row of the index against its clip, by sha256, and whether all tables can be read."""

from __future__ import annotations

import datetime
import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.check_scope import CheckedParts, CheckScope, short_hash
from ltx_ray.dataset.parts import UnreadablePart, list_segments, one_line, read_part, read_segment, segment_table, take
from ltx_ray.dataset.repair import Repair
from ltx_ray.storage.checksums import SHA256
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

#: Threads that read clips, and those that ask an object store for checksums or clips.
_THREADS, _REMOTE_THREADS = 8, 32
#: Rows that are checked at once: enough for every thread.
_BATCH = 256
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
    """A pass over the files of a dataset. It keeps 50 bytes of a row in memory."""

    store: Store
    #: Rows to choose for rendering again, and whether they alone are checked.
    sample: int = 0
    sample_alone: bool = False
    scope: CheckScope = CheckScope()  # noqa: RUF009 (frozen)
    #: What an earlier check has found well.
    checked: CheckedParts | None = None
    #: Whether clips are read though their store knows their sha256.
    read_all: bool = False
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
    #: Ids of the scope that no row of index/ has. Of a scope that leaves out more, they are not known.
    unknown_ids: set[str] = field(default_factory=set)
    #: Short hashes of ids, and of ids with their items.
    _seen: IdTable = field(default_factory=lambda: IdTable(8))
    #: Rows of the parts that are checked, by their footers, and those that were passed.
    _expected: int = 0
    _passed: int = 0
    #: The items of the sample, if they alone are checked.
    _chosen: frozenset[str] | None = None
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
        names = [name for name in self.store.list_names(layout.INDEX) if layout.is_visible(name)]
        names = list(filter(self.scope.takes_part, names))
        with self._pool() as pool:
            footers = dict(zip(names, pool.map(self._footer, names), strict=True))
        if since := self.scope.since:
            names = [name for name in names if (newest := footers[name][1]) is None or newest >= since]
        if self.sample_alone:
            names = self._choose_sample(names)
        elif self.scope == CheckScope(ids=self.scope.ids):
            self.unknown_ids = set(self.scope.ids or ())
        self._expected = sum(footers[name][0] for name in names)
        for name in names:
            part = self._index_part(name, footers[name][0])
            yield part
            if self.checked is not None and not part.findings:
                self.checked.add(name, footers[name][0])
        if self.has_other_tables:
            yield from self._other_parts()

    @property
    def is_whole(self) -> bool:
        """Whether every row is checked, so that the clips without one are known."""
        return self.scope.is_whole and not self.sample_alone

    @property
    def has_other_tables(self) -> bool:
        return self.scope.has_other_tables and not self.sample_alone

    def _other_parts(self) -> Iterator[CheckedPart]:
        for name in filter(layout.is_part, self.store.list_names(layout.PREVIEWS)):
            yield self._readable(f"{layout.PREVIEWS}/{name}", layout.PREVIEWS)
        for name in filter(layout.is_visible, self.store.list_names(layout.FAILED)):
            yield self._readable(f"{layout.FAILED}/{name}", layout.FAILED)
        for path in list_segments(self.store):
            yield self._segment(path)
        if self.is_whole:
            self._count_clips()

    # --- index/ ----------------------------------------------------------------------------------

    def _index_part(self, name: str, row_count: int) -> CheckedPart:
        """row_count: by its footer."""
        part = CheckedPart(f"{layout.INDEX}/{name}")
        # Of a part that was found well, rows are compared with those of other parts.
        known = self.checked is not None and self.checked.has(name, row_count)
        try:
            table = read_part(self.store, part.path, [*CheckScope.COLUMNS, "clip"] if known else None)
        except UnreadablePart as damage:
            return part.wrong(f"cannot be read as Parquet ({one_line(damage.__context__ or damage)})", _SET_ASIDE)
        if not known:
            schema = table.schema.remove_metadata()
            expected = layout.index_schema(schema.names)
            if not schema.equals(expected):
                wrong = [c.name for c in expected if c.name not in schema.names or schema.field(c.name).type != c.type]
                what = ", ".join(wrong) or "more, or another order"
                return part.wrong(f"does not have the columns of an index ({what})", _SET_ASIDE)
            if (problem := _foreign(name, table)) is not None:
                part.foreign = True
                return part.wrong(problem, _ADOPT)
        self._check_rows(part, table, known)
        self._passed += len(table)
        return part

    def _check_rows(self, part: CheckedPart, table: pa.Table, known: bool) -> None:
        numbers: Sequence[int] = range(len(table))
        if not self.is_whole:
            numbers = [at for at, row in enumerate(table.select(CheckScope.COLUMNS).to_pylist()) if self._takes(row)]
        told = 0
        with self._pool() as pool:
            for start in range(0, len(numbers), _BATCH):
                batch = numbers[start : start + _BATCH]
                rows = take(table, batch).to_pylist()
                wrong = itertools.repeat(None) if known else pool.map(self._wrong_clip, rows)
                for number, row, wrong_clip in zip(batch, rows, wrong, strict=False):
                    self._check_row(part, number, row, wrong_clip)
                told = batch[-1] + 1
                self.on_rows(self._passed + told, self._expected)
        if told < len(table):
            self.on_rows(self._passed + len(table), self._expected)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS if self.store.is_local else _REMOTE_THREADS)

    def _takes(self, row: IndexRow) -> bool:
        self.unknown_ids.discard(row["id"])
        return self.scope.takes(row) and (self._chosen is None or row["item_id"] in self._chosen)

    def _footer(self, name: str) -> tuple[int, datetime.datetime | None]:
        """Rows of a part of index/, and when the newest was finished, where that is known.

        Of a part that cannot be read, 0 and None.
        """
        if layout.PART.fullmatch(name):
            return 1, None
        try:
            with self.store.fs.open_input_file(self.store.path(f"{layout.INDEX}/{name}")) as file:
                footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError):
            return 0, None
        newest = []
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            columns = (group.column(at) for at in range(group.num_columns))
            column = next((column for column in columns if column.path_in_schema == "finished_at"), None)
            if column is None or column.statistics is None or not column.statistics.has_min_max:
                return footer.num_rows, None
            newest.append(column.statistics.max)
        return footer.num_rows, max(newest, default=None)

    def _choose_sample(self, names: list[str]) -> list[str]:
        """Choose the items of the sample, by few columns; returns the parts that have them or cannot be read.

        Those with the smallest hashes are spread over the dataset, and are the same each time.
        """
        heap: list[tuple[int, str]] = []
        where: dict[str, set[str]] = {}
        unreadable = set()
        for name in names:
            try:
                rows = self.store.read_columns(f"{layout.INDEX}/{name}", [*CheckScope.COLUMNS, "clip"]).to_pylist()
            except (pa.ArrowException, FileNotFoundError):
                unreadable.add(name)
                continue
            for row in rows:
                item_id = row["item_id"]
                if not item_id or row["clip"] is None or not self.scope.takes(row):
                    continue
                if item_id not in where:
                    entry = -short_hash(item_id), item_id
                    if len(heap) < self.sample:
                        heapq.heappush(heap, entry)
                    elif entry > heap[0]:
                        del where[heapq.heapreplace(heap, entry)[1]]
                    else:
                        continue
                where.setdefault(item_id, set()).add(name)
        self._chosen = frozenset(where)
        wanted = unreadable.union(*where.values())
        return [name for name in names if name in wanted]

    def _check_row(self, part: CheckedPart, number: int, row: IndexRow, wrong_clip: str | None) -> None:
        self.rows += 1
        if not row["id"] or not layout.ITEM_ID.fullmatch(row["item_id"] or ""):
            return part.wrong_row(number, row, "its row has no id or no item_id", _RENDER_AGAIN)
        self.clips += row["clip"] is not None
        of_row, of_id = (short_hash(text).to_bytes(8) for text in (f"{row['item_id']} {row['id']}", row["id"]))
        again, id_again = self._seen.has(of_row), self._seen.has(of_id)
        self.shared_ids += id_again and not again
        for digest, seen in ((of_row, again), (of_id, id_again)):
            if not seen:
                self._seen.put(digest)
        self._seen.settle()
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
        rank = -short_hash(row["item_id"])
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
            if not self.read_all and self.store.stored_checksums(clip).get(SHA256) == row["clip_sha256"]:
                return None
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
