"""The rows of one run on their way into the dataset: gathered, committed as segments, and folded into parts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.failures import FailureScope
from ltx_ray.dataset.fold import PART_ROWS, Folder
from ltx_ray.dataset.parts import encode_segment, key_bytes, read_part, read_segment, take
from ltx_ray.storage.store import Store

#: Seconds for which a committed row may be in no part.
FOLD_SECONDS = 900.0
#: Tables that copies of rows are taken from, and that are kept for the next ones.
_KEPT_TABLES = 4


class RowLog:
    """Adds rows to a dataset. A row is finished once `commit` has returned. To be used by one thread at a time.

    dataset: the id of the dataset. `holds_lease`: whether no other run has taken the output over; one that has brings
    failed/ up to date. `fold_failures`: whether failed/ may change while the run goes on, which it must not when its
    rows are read from there.
    """

    def __init__(
        self,
        store: Store,
        existing: ExistingRows,
        dataset: str,
        run_id: str,
        *,
        holds_lease: Callable[[], bool] = lambda: True,
        fold_failures: bool = True,
        part_rows: int = PART_ROWS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.existing = store, existing
        #: What a complete run has judged: see Folder.fold.
        self.scope: FailureScope | None = None
        self._run_id, self._part_rows, self._clock = run_id, part_rows, clock
        self._holds_lease, self._fold_failures = holds_lease, fold_failures
        self._folder = Folder(store, existing, dataset, run_id, part_rows)
        self._rows: dict[str, list[Mapping[str, Any]]] = {table: [] for table in layout.SEGMENT_SCHEMAS}
        self._segments = 0
        self._oldest: float | None = None
        self._failures = 0
        self._table = functools.lru_cache(_KEPT_TABLES)(self._read)

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """Add a row to what the next commit writes."""
        self._rows[table].append(row)

    def commit(self) -> None:
        """Write the rows that were added. Raises OSError when the store does not answer."""
        # Rows go before the marks of the failures that they overcome.
        for table, rows in self._rows.items():
            if rows:
                self._create(table, rows)
                if self._oldest is None:
                    self._oldest = self._clock()
                self._rows[table] = []

    def _create(self, table: str, rows: list[Mapping[str, Any]]) -> None:
        data = encode_segment(rows, table)
        while True:
            path = layout.segment_path(self._run_id, self._segments, table)
            self._segments += 1
            if self.store.create(path, data):
                break
        if table == layout.FAILED:
            self._failures += len(rows)
        else:
            keys = (key_bytes(row["item_id"], layout.row_key(row["id"])) for row in rows)
            self.existing.table(table).add_pending(keys, path)

    @property
    def oldest_age(self) -> float:
        """Seconds for which the oldest row that this run has committed is in no part; 0 without one."""
        oldest = self._oldest
        return 0.0 if oldest is None else self._clock() - oldest

    @property
    def fold_is_due(self) -> bool:
        """Whether enough rows are in segments, or one has been there for long."""
        waiting = self.existing.pending_count + (self._failures if self._fold_failures else 0)
        late = self._oldest is not None and self._clock() - self._oldest >= FOLD_SECONDS
        return waiting >= self._part_rows or (late and waiting > 0)

    def fold(self) -> None:
        """Fold while the run goes on. Raises OSError."""
        self._folder.fold(failures=self._fold_failures and self._holds_lease(), thorough=False)
        self._failures, self._oldest = 0, None

    def close(self) -> None:
        """Fold what is left at the end of the run. Raises OSError."""
        self._folder.fold(failures=self._holds_lease(), scope=self.scope)

    def row(self, table: str, item_id: str, key: str) -> dict[str, Any]:
        """The row of a finished item. Raises UnreadablePart, and FileNotFoundError when its part is gone."""
        # Its many functions would cost every run and plan a tenth of their speed, by the garbage collector's rounds.
        import pyarrow.compute as pc

        wanted = key_bytes(item_id, key)
        path = self.existing.table(table).path_of(wanted)
        assert path is not None, (table, item_id, key)
        rows = self._table(path)
        for number in pc.indices_nonzero(pc.equal(rows["item_id"], item_id)).to_pylist():
            row = take(rows, [number]).to_pylist()[0]
            if layout.row_key(row["id"]) == key:
                return row
        raise FileNotFoundError(f"{path}: its row of {item_id} is gone")

    def _read(self, path: str) -> pa.Table:
        is_segment = path.startswith(f"{layout.SEGMENTS}/")
        return read_segment(self.store, path) if is_segment else read_part(self.store, path)
