"""Folding: rows of segments are moved into numbered parts, of which each is created only if it is absent.

docs/dataset.md#how-rows-get-there says why no crash and no second driver loses or doubles a row.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.clips import is_whole_mp4
from ltx_ray.dataset.description import describe_dataset
from ltx_ray.dataset.existing import ExistingRows, TableRows, list_existing
from ltx_ray.dataset.failures import FailedParts, FailureScope, fold_failures
from ltx_ray.dataset.identity import dataset_id
from ltx_ray.dataset.parts import (
    KEY_BYTES,
    encode_part,
    keys_of,
    list_segments,
    read_keys,
    read_segment,
    segment_table,
    take,
)
from ltx_ray.dataset.removal import finish_removals
from ltx_ray.dataset.removed import read_removed
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.store import Store

#: Rows of a part, unless fewer are there to be folded.
PART_ROWS = 10_000
_THREADS = 8

Segment = tuple[str, pa.Table]
OnRows = Callable[[int, int], None]


class Folder:
    """Folds the segments of one dataset. `existing` is kept up to date.

    dataset: its id, 8 hex digits. writer: who folds, for the metadata of parts: two drivers never write the same bytes.
    """

    def __init__(self, store: Store, existing: ExistingRows, dataset: str, writer: str, part_rows: int = PART_ROWS):
        self._store, self._existing = store, existing
        self._dataset, self._writer, self._part_rows = dataset, writer, part_rows
        #: Called with the rows of a table that were folded and with how many there are, after each part.
        self.on_rows: OnRows = lambda done, total: None

    def fold(
        self,
        *,
        failures: bool = True,
        thorough: bool = True,
        scope: FailureScope | None = None,
        keeps: Callable[[str, pa.Table], pa.Table] = lambda table, rows: rows,
    ) -> int:
        """Fold all segments, those of other runs too, and delete them; returns the number of rows that became folded.

        failures: whether failed/ is brought up to date; only the holder of the lease may do that. `thorough`: whether
        failures of rows that have been rendered since leave it now. `scope`: which of its older failures a complete run
        has judged anew. `keeps(table, rows)`: the pending rows that are to be folded; the others are dropped.

        Raises OSError when the store does not answer, UnreadablePart for a damaged part.
        """
        by_table: dict[str, list[str]] = {name: [] for name in layout.SEGMENT_SCHEMAS}
        for path in list_segments(self._store):
            by_table[segment_table(path)].append(path)
        folded, read = 0, []
        for name in (layout.INDEX, layout.PREVIEWS):
            segments = self._read(by_table[name])
            if segments:
                folded += self._fold_rows(name, pa.concat_tables([table for _, table in segments]), keeps)
                read += [path for path, _ in segments]
        if failures:
            segments = self._read(by_table[layout.FAILED])
            if segments or (thorough and self._existing.failed_count):
                tables = [table for _, table in segments]
                where = FailedParts(self._store, self._dataset, self._writer, self._part_rows)
                fold_failures(where, self._existing, tables, thorough, scope)
            read += [path for path, _ in segments]
        self._store.delete_many(read)
        for folder in sorted({path.rpartition("/")[0] for path in read}):
            self._store.remove_empty_folder(folder)
        return folded

    def _read(self, paths: list[str]) -> list[Segment]:
        """The segments that are still there."""

        def read(path: str) -> Segment | None:
            try:
                return path, read_segment(self._store, path)
            except FileNotFoundError:
                return None  # Another driver has folded it.

        if self._store.is_local or len(paths) < 2:  # Threads would wait for each other, not for the disk.
            return [segment for path in paths if (segment := read(path)) is not None]
        with ThreadPoolExecutor(_THREADS) as pool:
            return [segment for segment in pool.map(read, paths) if segment is not None]

    def _fold_rows(self, name: str, rows: pa.Table, keeps: Callable[[str, pa.Table], pa.Table]) -> int:
        known = self._existing.table(name)
        pending = keys_of(rows)
        # A run that had lost the lease may have made rows that were taken down meanwhile.
        kept = keeps(name, self._existing.removed.left(rows))
        keys, rows = pending if kept is rows else keys_of(kept), kept
        folded = 0
        # Of rows with one key, the first is kept; those that a part has are left out.
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        left = sorted(known.not_folded(list(first)))
        while left:
            chunk = left[: _chunk(len(left), self._part_rows)]
            part = layout.part_name(self._dataset, known.next_number(self._dataset))
            data = encode_part(take(rows, [first[key] for key in chunk]), name, self._writer)
            if self._store.create(f"{name}/{part}", data):
                known.fold(part, chunk)
                folded += len(chunk)
                self.on_rows(folded, folded - len(chunk) + len(left))
                left = left[len(chunk) :]
            else:
                learn_part(self._store, known, part)
                left = known.not_folded(left)
        known.drop_pending(pending)
        return folded


def learn_part(store: Store, known: TableRows, part: str) -> None:
    """Take in the rows of a part that another driver wrote."""
    keys = read_keys(store, f"{known.folder}/{part}")
    known.fold(part, [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)])


def _chunk(rows: int, part_rows: int) -> int:
    """Rows of the next part, so that parts have about `part_rows` rows and none has few."""
    return -(-rows // max(1, round(rows / part_rows)))


def fold_dataset(
    store: Store,
    existing: ExistingRows,
    dataset: str,
    writer: str,
    say: Callable[[str], None],
    on_rows: OnRows = lambda done, total: None,
) -> int:
    """Fold what a run that was killed left, under the lease; returns the number of rows.

    A damaged segment is set aside. On a local disk, rows whose clip is not whole are dropped: they are to be rendered
    again. The clips of folded rows are left to `verify`.
    """
    for damage in existing.damaged:
        say(f"{damage.path} is damaged and now {set_aside(store, damage.path)}; its rows are rendered again")
    if not existing.segments:
        return 0

    def keeps(table: str, rows: pa.Table) -> pa.Table:
        lost = set(without_whole_clip(store, rows)) if store.is_local and table == layout.INDEX else set()
        if lost:
            say(f"{len(lost)} rows of a run that was killed have no whole clip, and are rendered again")
        return take(rows, (number for number in range(len(rows)) if number not in lost)) if lost else rows

    folder = Folder(store, existing, dataset, writer)
    folder.on_rows = on_rows
    return folder.fold(keeps=keeps)


def remove_empty_folders(store: Store) -> None:
    """Remove the folders of runs that have no segments; a run that was killed leaves one. Under the lease."""
    if store.is_local:
        for run in store.folders(layout.SEGMENTS):
            store.remove_empty_folder(f"{layout.SEGMENTS}/{run}")


def set_aside(store: Store, path: str) -> str:
    """Move a file of the dataset below state/aside/; returns where it is now."""
    data, moved_to = store.read_bytes(path), f"{layout.ASIDE}/{path}"
    while not store.create(moved_to, data):
        stem, dot, ending = f"{layout.ASIDE}/{path}".rpartition(".")
        moved_to = f"{stem}-{secrets.token_hex(4)}{dot}{ending}"
    store.delete(path)
    return moved_to


def without_whole_clip(store: Store, rows: pa.Table) -> list[int]:
    """Numbers of those rows of a local dataset whose clip is missing or cut off."""
    clips = rows["clip"].to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        whole = pool.map(lambda clip: clip is None or is_whole_mp4(store.path(clip)), clips)
        return [number for number, good in enumerate(whole) if not good]


def fold_output(
    store: Store,
    say: Callable[[str], None],
    then: Callable[[str, str], None] | None = None,
    on_rows: OnRows = lambda done, total: None,
    wait_seconds: float = math.inf,
) -> int:
    """Fold what runs have finished and not folded, when no run is at work any more; returns the number of rows.

    `then(dataset, writer)` is called under the lease, `on_rows` with the rows that were folded and with how many there
    are. `wait_seconds`: as Lease.acquire has it, with its ValueError. Raises OSError when the store does not answer,
    ValueError for one that cannot be written.
    """
    if then is None and not list_segments(store) and not read_removed(store).unfinished:
        return 0
    store.check_writable("OUTPUT")
    writer = f"fold-{secrets.token_hex(3)}"
    lease = Lease(store, writer)
    lease.acquire(say, wait_seconds)
    try:
        dataset = dataset_id(store)
        existing = list_existing(store, say)
        folded = fold_dataset(store, existing, dataset, writer, say, on_rows)
        if finish_removals(store, existing, say):
            existing = list_existing(store, say)
        if then is not None:
            then(dataset, writer)
            existing = list_existing(store, say)
        describe_dataset(store, existing)
        remove_empty_folders(store)
        return folded
    finally:
        lease.release()
