"""Random schedules of drivers over the real code of the dataset's tables, with interruptions at any operation.

A schedule is drawn from a seed. One or two drivers render a few rows into a store in memory. Before each operation of
the store another driver may go on, and before or after it a driver may die; the same command is then started again.
In some schedules a row is taken down, by a command that dies as drivers do. After every operation a plain reader looks
at `index/`.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.cli import remove as removing
from ltx_ray.dataset import existing as existing_rows
from ltx_ray.dataset import fold, layout
from ltx_ray.dataset.clips import publish_clip
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import fold_dataset
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import KEY_COLUMNS
from ltx_ray.dataset.removal import finish_removals
from ltx_ray.dataset.row_log import RowLog
from ltx_ray.dataset.writer import DatasetWriter
from ltx_ray.engine.fake import mp4_boxes, read_metadata
from ltx_ray.manifest.raw import RawRow
from ltx_ray.records import Clip
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store
from tests.support.results import CRASH, RENDERED
from tests.support.samples import request

#: (item, id) of each row. Rows of one item are copies of the first that is finished.
ROWS = tuple((hashlib.sha256(f"item {n // 2}".encode()).hexdigest()[:32], f"r{n}") for n in range(6))
_REQUESTS = {row_id: request(id=row_id) for _, row_id in ROWS}
_LATENTS = "d" * 64
#: Rows of a part, so that a run has several.
_PART_ROWS = 2
#: Columns that the model looks at. Whole schemas would take most of the time.
_COLUMNS = {*KEY_COLUMNS, "clip", "clip_sha256", "source", "error_class", "mark"}
_MOST_OPERATIONS, _MOST_LIVES = 3000, 7


class Died(BaseException):
    """A driver's process has ended."""


class Files(dict[str, bytes]):
    """What the store holds."""


class SharedStore:
    """A driver's view of `files`, as a `Store`. `turn` is called before and after each operation."""

    is_local, name, uri, root = False, "memory", "memory", "memory"

    def __init__(self, files: Files, turn: Callable[[], None]):
        self._files, self._turn = files, turn

    def _do(self, operation: Callable[[], Any]) -> Any:
        self._turn()
        answer = operation()
        self._turn()
        return answer

    def check_writable(self, what: str) -> None:
        pass

    def create(self, path: str, data: bytes) -> bool:
        return self._do(lambda: self._files.setdefault(path, data) is data)

    def read_bytes(self, path: str) -> bytes:
        return self._do(lambda: self._read(path))

    def _read(self, path: str) -> bytes:
        if path not in self._files:
            raise FileNotFoundError(path)
        return self._files[path]

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read_bytes(path)
        return data, hashlib.sha256(data).hexdigest()

    def read_columns(self, path: str, columns: list[str]) -> pa.Table:
        return read_parquet(self.read_bytes(path), columns)

    def update(self, path: str, data: bytes, version: str) -> bool:
        def replace_it() -> bool:
            same = hashlib.sha256(self._files.get(path, b"")).hexdigest() == version
            if same:
                self._files[path] = data
            return same

        return self._do(replace_it)

    def names(self, folder: str) -> Iterator[str]:
        return iter(self._do(lambda: self._below(folder)))

    def list_names(self, folder: str) -> list[str]:
        return self._do(lambda: sorted(name for name in self._below(folder) if "/" not in name))

    def _below(self, folder: str) -> list[str]:
        start = f"{folder}/"
        return [path.removeprefix(start) for path in self._files if path.startswith(start)]

    def delete(self, path: str) -> None:
        self._do(lambda: self._files.pop(path, None))

    def delete_many(self, paths: Any) -> None:
        for path in paths:
            self.delete(path)

    def remove_empty_folder(self, folder: str) -> None:
        pass

    def path(self, relative: str = "") -> str:
        return relative


class Driver:
    """A run in a thread that goes on only when it is given a turn."""

    def __init__(self, number: int, schedule: Schedule):
        self._schedule, self.dice = schedule, random.Random(schedule.dice.random())
        self.run_id = f"run{number}"
        self.acknowledged: set[str] = set()
        self.ended = self.killed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._live, daemon=True).start()

    def give_turn(self, kill: bool = False) -> None:
        """Go on up to the next operation, or to its end. `kill`: die in place of that."""
        self.killed = kill
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def _turn(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self.killed:
            raise Died

    def _live(self) -> None:
        self._go.acquire()
        try:
            if not self.killed:
                self._run(SharedStore(self._schedule.files, self._turn))  # type: ignore[arg-type]
        except Died:
            pass
        except BaseException as error:
            self._error = error
        self.ended = True
        self._stopped.release()

    def _run(self, store: Store) -> None:
        dice = self.dice
        dataset, existing = dataset_id(store), list_existing(store)
        fold_dataset(store, existing, dataset, self.run_id, lambda message: None)
        if finish_removals(store, existing, lambda message: None):
            existing = list_existing(store)
        holds_lease = lambda: self._schedule.holder is self  # noqa: E731
        log = RowLog(store, existing, dataset, self.run_id, part_rows=_PART_ROWS, holds_lease=holds_lease)
        writer = DatasetWriter(log)
        waiting: list[str] = []
        for item_id, row_id in ROWS:
            if existing.has_row(item_id, layout.row_key(row_id)) or existing.removed.has_row(item_id, row_id):
                continue
            key = existing.key_of(item_id)
            if dice.random() < self._schedule.failing:
                writer.write_failed(item_id, _REQUESTS[row_id], RawRow("m.jsonl", 1, {}), CRASH)
            elif key is not None:
                try:
                    writer.copy_index_row(item_id, key, _REQUESTS[row_id])
                except FileNotFoundError:
                    continue  # the other driver has folded its segment: the row is left to the next run
            else:
                writer.write_index(item_id, _REQUESTS[row_id], replace(RENDERED, clip=self._rendered(store, item_id)))
            waiting.append(row_id)
            if dice.random() < 0.6:
                log.commit()
                self.acknowledged.update(waiting)
                waiting.clear()
            if dice.random() < 0.4:
                log.fold()
        log.commit()
        self.acknowledged.update(waiting)
        log.close()

    def _rendered(self, store: Store, item_id: str) -> Clip:
        # The bytes of an mp4 may differ each time.
        data = mp4_boxes(item_id, _LATENTS) + (16).to_bytes(4) + b"free" + self.dice.randbytes(8)
        path = layout.clip_path(item_id)
        clip = Clip(path, hashlib.sha256(data).hexdigest(), _LATENTS, (), "stage_1")
        return publish_clip(store, clip, item_id, data, read_metadata)


class Remover(Driver):
    """The command that takes a row down. It has the lease, which a driver beside it has lost without noticing."""

    def _run(self, store: Store) -> None:
        removing.remove(store, frozenset({self._schedule.takes_down}), lambda text: None, lambda done, total: None)


class Schedule:
    """One store and the drivers that work on it. `wrong` says what a plain reader found, or what was lost."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        self.files = Files()
        self.failing = self.dice.choice([0.0, 0.3])
        self.wrong: Counter[str] = Counter()
        self._tables: dict[bytes, list[dict[str, Any]]] = {}
        self._acknowledged: set[str] = set()
        self._lives = 0
        self.holder: Driver | None = None
        #: The row, or the item, that is taken down; the rows that have to go once that has begun, and those that may
        #: go with them: a row that was never there does not tell which item it would be.
        row = self.dice.choice(ROWS)
        self.takes_down = self.dice.choice([None, *row])
        self._gone: set[str] = set()
        self._going: set[str] = set()
        self._two = False

    def run(self, drivers: int) -> Counter[str]:
        self._two = drivers == 2
        live = [self._start() for _ in range(drivers)]
        for _ in range(_MOST_OPERATIONS):
            if not live or self.wrong:
                break
            if self._two and self.takes_down and not self._going and self.dice.random() < 0.02:
                live.append(self._start_remover())
            driver = self.dice.choice(live)
            kill = self._lives < _MOST_LIVES and self.dice.random() < 0.03
            self._turn(driver, kill)
            if driver.ended:
                live.remove(driver)
                if kill:
                    live.append(self._start_again(driver))
                elif not live and self.takes_down and not self._going:
                    live.append(self._start_remover())
        if self.wrong:
            for driver in live:
                driver.give_turn(kill=True)
            return self.wrong
        assert not live, "a driver does not end"
        self.failing = 0.0
        self._to_the_end(self._start())
        # A driver beside a removal may render an id that had no row; the same removal again takes that out.
        records = b"".join(data for path, data in self.files.items() if path.startswith(layout.REMOVED))
        if any(row["id"] in self._gone and row["item_id"].encode() in records for row in self._rows(layout.INDEX)):
            self.wrong["a row that was taken down is there"] += 1
        if self._going:
            # A driver beside the removal may have made a clip since, and died before it had a row.
            self._to_the_end(self._start_remover())
        self._check_end()
        return self.wrong

    def _to_the_end(self, driver: Driver) -> None:
        while not driver.ended and not self.wrong:
            self._turn(driver, False)

    def _start_again(self, killed: Driver) -> Driver:
        """What is done after a death: the same command, or the other one."""
        remover = isinstance(killed, Remover)
        if self.takes_down and not self._two and (remover or not self._going) and self.dice.random() < 0.5:
            remover = not remover
        return self._start_remover() if remover else self._start()

    def _start_remover(self) -> Driver:
        self._lives += 1
        items = {item_id for item_id, row_id in ROWS if self.takes_down in (item_id, row_id)}
        self._going = {row_id for item_id, row_id in ROWS if item_id in items}
        self._gone = {self.takes_down} & self._going or self._going
        self.holder = Remover(self._lives, self)
        return self.holder

    def _start(self) -> Driver:
        self._lives += 1
        self.holder = Driver(self._lives, self)
        return self.holder

    def _turn(self, driver: Driver, kill: bool) -> None:
        before = dict(self.files)
        driver.give_turn(kill)
        self._acknowledged |= driver.acknowledged
        if before != self.files:
            self._look()

    def _look(self) -> None:
        rows = self._rows(layout.INDEX)
        if len({row["id"] for row in rows}) < len(rows):
            self.wrong["a row is there twice"] += 1
        for row in rows:
            if self._two and row["id"] in self._going:
                continue  # a driver that has lost the lease may name a clip that was taken down
            if hashlib.sha256(self.files.get(row["clip"], b"")).hexdigest() != row["clip_sha256"]:
                self.wrong["a sha256 is not that of the clip"] += 1
        known = {row["id"] for row in (*rows, *self._rows(layout.FAILED), *self._segments())}
        if self._acknowledged - known - self._going:
            self.wrong["a row is lost"] += 1

    def _check_end(self) -> None:
        rows = self._rows(layout.INDEX)
        ids = {row["id"] for row in rows}
        if {row_id for _, row_id in ROWS} - ids - self._going:
            self.wrong["a row is missing at the end"] += 1
        if self._gone & ids:
            self.wrong["a row that was taken down is there"] += 1
        if {path for path in self.files if path.startswith(layout.CLIPS)} - {row["clip"] for row in rows}:
            self.wrong["a clip without a row is there"] += 1
        if self._rows(layout.FAILED):
            self.wrong["a failure that was overcome is still there"] += 1
        if self._segments():
            self.wrong["segments are left"] += 1

    def _rows(self, folder: str) -> list[dict[str, Any]]:
        parts = [data for path, data in self.files.items() if path.startswith(f"{folder}/part-")]
        return [row for data in parts for row in self._decoded(data, lambda data: pq.read_table(io.BytesIO(data)))]

    def _segments(self) -> list[dict[str, Any]]:
        segments = [data for path, data in self.files.items() if path.startswith(layout.SEGMENTS)]
        return [row for data in segments for row in self._decoded(data, lambda d: pa.ipc.open_stream(d).read_all())]

    def _decoded(self, data: bytes, decode: Callable[[bytes], pa.Table]) -> list[dict[str, Any]]:
        if data not in self._tables:
            self._tables[data] = decode(data).to_pylist()
        return self._tables[data]


class _Inline:
    """A pool of threads without threads, so that a seed gives one order of operations."""

    def __init__(self, threads: int):
        pass

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    map = staticmethod(map)


@contextmanager
def small_and_single_threaded() -> Iterator[None]:
    """The real code with few columns, and without threads of its own."""
    part_schemas, segment_schemas = (
        {name: pa.schema([field for field in schema if field.name in _COLUMNS]) for name, schema in schemas.items()}
        for schemas in (layout.PART_SCHEMAS, layout.SEGMENT_SCHEMAS)
    )
    with (
        mock.patch.object(existing_rows, "ThreadPoolExecutor", _Inline),
        mock.patch.object(fold, "ThreadPoolExecutor", _Inline),
        mock.patch.object(removing, "Lease", mock.MagicMock()),
        mock.patch.object(removing, "describe_dataset", mock.MagicMock()),
        mock.patch.object(layout, "PART_SCHEMAS", part_schemas),
        mock.patch.object(layout, "SEGMENT_SCHEMAS", segment_schemas),
    ):
        yield


def run_schedules(seeds: range, drivers: int) -> dict[int, Counter[str]]:
    """What went wrong, by seed."""
    with small_and_single_threaded():
        return {seed: wrong for seed in seeds if (wrong := Schedule(seed).run(drivers))}
