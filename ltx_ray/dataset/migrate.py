"""Moves the parts of one row that earlier versions wrote into numbered parts, under the lease."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.fold import PART_ROWS, Folder, set_aside
from ltx_ray.dataset.parts import UnreadablePart, encode_segment, read_part, with_columns
from ltx_ray.storage.store import Store

_THREADS = 16


def migrate(
    store: Store,
    dataset: str,
    run_id: str,
    say: Callable[[str], None],
    at_once: int = PART_ROWS,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Move all parts of one row into numbered parts; returns the number of rows that were moved.

    Rows are moved `at_once` at a time: into a segment first, then out of their parts, then into a numbered part. So a
    reader of a table sees no row twice, and misses those for that moment; and wherever this is interrupted, the next
    fold goes on. Segments of before must be folded. A part that cannot be moved is named by `say` and stays. `on_rows`
    is called with the number of rows that were looked at and with how many there are.
    """
    existing = list_existing(store, say, one_row_parts=False)
    folder = Folder(store, existing, dataset, run_id)
    moved = segments = done = 0
    by_table = {table: _one_row_parts(store, table) for table in layout.PART_SCHEMAS}
    total = sum(map(len, by_table.values()))
    for table, names in by_table.items():
        for start in range(0, len(names), at_once):
            found = _read(store, table, names[start : start + at_once], say)
            if found:
                rows = pa.concat_tables([with_columns(part, layout.PART_SCHEMAS[table]) for _, part in found])
                segment = layout.segment_path(run_id, segments, table)
                while not store.create(segment, encode_segment(rows, table)):
                    segments += 1
                    segment = layout.segment_path(run_id, segments, table)
                segments += 1
                store.delete_many(path for path, _ in found)
                folder.fold(thorough=False)
                moved += len(rows)
            done += len(names[start : start + at_once])
            on_rows(done, total)
    for name in [name for name in store.names(layout.INDEX) if not layout.is_visible(name)]:
        set_aside(store, f"{layout.INDEX}/{name}")  # Earlier versions set parts aside in index/ itself.
    return moved


def _one_row_parts(store: Store, table: str) -> list[str]:
    pattern = layout.FAILED_PART if table == layout.FAILED else layout.PART
    return sorted(filter(pattern.fullmatch, store.list_names(table)))


def _read(store: Store, table: str, names: list[str], say: Callable[[str], None]) -> list[tuple[str, pa.Table]]:
    """(path, row) of each part that holds the row that its name says, or a failed row."""

    def read(name: str) -> tuple[str, pa.Table] | None:
        path = f"{table}/{name}"
        try:
            rows = read_part(store, path)
        except UnreadablePart as damage:
            say(str(damage))
            return None
        if len(rows) != 1 or (table != layout.FAILED and name != _due_name(rows)):
            say(f"{path} is not named after its row and stays; ltx-ray verify --repair mends that")
            return None
        return path, rows

    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(read, names) if found is not None]


def _due_name(rows: pa.Table) -> str:
    [item_id], [row_id] = rows["item_id"].to_pylist(), rows["id"].to_pylist()
    return layout.one_row_part(item_id or "", layout.row_key(row_id))
