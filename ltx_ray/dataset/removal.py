"""Takes down rows: out of all tables, with their clips, latents and pictures. To be called under the lease.

Rows go before the files that they name, so that no reader meets a row without its clip. Wherever this is interrupted,
the next start of a run, fold or removal goes on.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.failures import place_of_row
from ltx_ray.dataset.parts import KEY_COLUMNS, encode_part, take, unreadable
from ltx_ray.dataset.removed import RemovedRows, record_finished
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store

_TABLES = (layout.INDEX, layout.PREVIEWS, layout.FAILED)
#: Who wrote a part, in its metadata.
_WRITER = "remove"

#: Called with the number of parts that were read and with how many there are.
OnParts = Callable[[int, int], None]


class Leaves(Protocol):
    """What leaves a table."""

    def numbers_left(self, rows: pa.Table) -> list[int]: ...


@dataclass
class NamedFailures:
    """Rows of failed/ with one of these ids, item_ids or places, and which of these there were.

    A place is `<manifest>:<row>`, where the manifest is named in any way that `render` takes.
    """

    names: frozenset[str]
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        #: The names by what stands in a row that they name.
        self._meant: defaultdict[str | None, set[str]] = defaultdict(set)
        for name in self.names:
            for value in (name, place_of_row(name)):
                self._meant[value].add(name)

    def numbers_left(self, rows: pa.Table) -> list[int]:
        columns = (rows[name].to_pylist() for name in ("id", "item_id", "source"))
        left = []
        for number, (row_id, item_id, source) in enumerate(zip(*columns, strict=True)):
            values = self._meant.keys() & {row_id, item_id, place_of_row(source or "")}
            self.known.update(*(self._meant[value] for value in values))
            if not values:
                left.append(number)
        return left


def take_failures(store: Store, failures: NamedFailures, on_parts: OnParts = lambda done, total: None) -> int:
    """Take rows out of failed/ alone, and return how many. There must be no segments. Raises UnreadablePart."""
    paths = _failed_parts(store)
    rows = 0
    for done, path in enumerate(paths):
        on_parts(done, len(paths))
        rows += _rewrite(store, path, failures)
    return rows


def _failed_parts(store: Store) -> list[str]:
    return [f"{layout.FAILED}/{name}" for name in store.names(layout.FAILED) if layout.is_part(name)]


def finish_removals(store: Store, existing: ExistingRows, say: Callable[[str], None]) -> bool:
    """Take out what was taken down and is there nevertheless; whether there was any, so that `existing` is out of date.

    A removal was interrupted, or a run that had lost the lease without noticing has written rows since.
    """
    removed = existing.removed
    if not removed:
        return False
    stale = {item for item in removed.items if any(_table_has(existing, name, item) for name in _TABLES[:2])}
    if not (removed.unfinished or stale):
        return False
    take_down(store, existing, removed if removed.unfinished else RemovedRows(stale))
    say("what was taken down was still there in part (a removal was interrupted), and is gone now")
    return True


def _table_has(existing: ExistingRows, name: str, item: bytes) -> bool:
    return existing.table(name).key_of(item.hex()) is not None


def take_down(
    store: Store, existing: ExistingRows, removed: RemovedRows, on_parts: OnParts = lambda done, total: None
) -> int:
    """Take out all rows and files of what is `removed`; returns the number of rows. There must be no segments.

    Raises UnreadablePart for a damaged part that may have some of the rows.
    """
    paths = [
        *_parts_of_items(existing, removed.items),
        *_failed_parts(store),
    ]
    rows = 0
    for done, path in enumerate(paths):
        on_parts(done, len(paths))
        rows += _rewrite(store, path, removed)
    on_parts(len(paths), len(paths))
    store.delete_many(itertools.chain.from_iterable(map(_files_of, sorted(item.hex() for item in removed.items))))
    _clean_aside(store, removed)
    # Pages show prompts and pictures. `ltx-ray report` makes the newest again.
    store.delete_many([layout.REPORT, layout.COMPARISON, *_older_reports(store)])
    for record in removed.unfinished:
        record_finished(store, record)
    return rows


def _parts_of_items(existing: ExistingRows, items: Iterable[bytes]) -> list[str]:
    items = sorted(items)
    return sorted({path for name in _TABLES[:2] for item in items for path in existing.table(name).parts_of_item(item)})


def _files_of(item_id: str) -> Iterator[str]:
    for path in (layout.clip_path, layout.preview_path, layout.latents_path, layout.thumb_path):
        yield path(item_id)


def _rewrite(store: Store, path: str, removed: Leaves) -> int:
    """Take rows out of a part, which keeps its name; returns how many."""
    table, _, name = path.partition("/")
    while True:
        try:
            data, version = store.read_versioned(path)
            rows = read_parquet(data)
            left = removed.numbers_left(rows)
        except FileNotFoundError:
            return 0
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise unreadable(store, path, error) from None
        if len(left) == len(rows):
            return 0
        if layout.NUMBERED_PART.fullmatch(name) is None and not left:
            store.delete(path)
            return len(rows)
        # A numbered part stays though it is empty: its number must not be given to other rows.
        if store.update(path, encode_part(take(rows, left), table, _WRITER), version):
            return len(rows) - len(left)


def _clean_aside(store: Store, removed: RemovedRows) -> None:
    """Delete what repair has set aside of the items: clips, and parts and segments that have rows of theirs."""
    for name in list(store.names(layout.ASIDE)):
        path = f"{layout.ASIDE}/{name}"
        match = layout.ITEM_ID.search(name)
        goes = match is not None and bytes.fromhex(match[1]) in removed.items
        if goes or (name.endswith((".parquet", ".rows")) and _may_have(store, path, removed)):
            store.delete(path)


def _may_have(store: Store, path: str, removed: RemovedRows) -> bool:
    """Whether a file that was set aside has rows of what is removed. A damaged one may."""
    try:
        data = store.read_bytes(path)
        if path.endswith(".parquet"):
            rows = read_parquet(data, list(KEY_COLUMNS))
        else:
            with pa.ipc.open_stream(data, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
                rows = reader.read_all()
        return len(removed.numbers_left(rows)) < len(rows)
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return True


def _older_reports(store: Store) -> list[str]:
    return [f"{layout.RUNS}/{name}" for name in store.names(layout.RUNS) if name.endswith(f"/{layout.REPORT}")]
