"""Repairs what a crash, a lost disk or a careless copy left in index/, before a run looks up its rows.

Nothing is deleted. A part that cannot stay is set aside: it is renamed to start with "_", so that readers of `part-*`
and of the folder ignore it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.layout import INDEX_SCHEMA, row_key
from ltx_ray.dataset.writer import one_row
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store

_THREADS = 8
#: Clips of a local dataset that one task checks.
_BATCH = 2048
#: Most names that a message lists.
_SHOWN = 3


@dataclass
class Repaired:
    """Names (within index/) of the parts that were repaired, by kind."""

    #: Parts that were not named after their row, set aside.
    duplicates: list[str] = field(default_factory=list)
    #: Parts written for rows that only a part of `duplicates` held.
    published: list[str] = field(default_factory=list)
    #: Parts that cannot be read as a table of the index, set aside.
    unreadable: list[str] = field(default_factory=list)
    #: Parts whose clip is missing or incomplete, set aside.
    lost: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.duplicates or self.published or self.unreadable or self.lost)

    def messages(self) -> list[str]:
        reasons = {
            "is misnamed, and its rows have parts of their own: now index/_duplicate-*":
                self.duplicates,
            "was written for a row that only a misnamed part held": self.published,
            "cannot be read: now index/_unreadable-*; its row is rendered again": self.unreadable,
            "no longer has a complete clip: now index/_lost-*; its row is rendered again": self.lost,
        }  # fmt: skip
        return [f"repaired: {_names(names)} {why}" for why, names in reasons.items() if names]


def repair(store: Store, existing: ExistingRows, say: Callable[[str], None]) -> Repaired:
    """Repair what listings (and on a local disk the boxes of clips) show to be wrong, and update `existing`.

    To be called under the lease, before rows are planned. Raises OSError when the store does not answer.
    """
    repaired = Repaired()
    misnamed: list[str] = []

    def whole_parts() -> Iterator[str]:
        for name, size in _index(store):
            if layout.PART.fullmatch(name) is None:
                misnamed.append(name)
            elif size:
                yield name
            else:
                repaired.unreadable.append(name)
                _drop(existing, name)

    broken = _without_clip(store, whole_parts())
    for name in repaired.unreadable:
        set_aside(store, name, "unreadable")
    for name in sorted(misnamed):
        if (new := _adopt(store, existing, name)) is None:
            repaired.unreadable.append(name)
            set_aside(store, name, "unreadable")
        else:
            repaired.published += new
            repaired.duplicates.append(name)
            set_aside(store, name, "duplicate")
    for name in itertools.chain(broken, _without_clip(store, iter(sorted(repaired.published)))):
        if _names_clip(store, name):
            _drop(existing, name)
            repaired.lost.append(name)
            set_aside(store, name, "lost")
    for message in repaired.messages():
        say(message)
    return repaired


def set_aside(store: Store, name: str, why: str) -> None:
    """Rename a part of the index so that readers ignore it. `why`: "duplicate", "unreadable" or "lost"."""
    store.move(f"{layout.INDEX}/{name}", layout.set_aside_path(name, why))


def _drop(existing: ExistingRows, name: str) -> None:
    match = layout.PART.fullmatch(name)
    assert match is not None, name
    item_id, key = match.groups()
    existing.drop_row(item_id, key)


def is_whole_mp4(path: str) -> bool | None:
    """Whether the top-level boxes of a local file are those of an mp4 and end where the file ends; None without a file.

    A box is its size (4 bytes), its type (4 bytes) and, for size 1, its size in 8 bytes (ISO/IEC 14496-12, 4.2).
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        end, offset = os.fstat(handle).st_size, 0
        kinds: list[bytes] = []
        first = os.pread(handle, 64, 0)  # one read gets the headers of most clips, of which there may be a million
        while offset < end:
            head = first[offset : offset + 16] if offset < 48 else os.pread(handle, 16, offset)
            size, kind = int.from_bytes(head[:4]), head[4:8]
            if size == 1:
                size = int.from_bytes(head[8:16])
            elif size == 0:  # the box ends with the file
                size = end - offset
            if size < 8 or not (kinds or kind == b"ftyp"):
                return False
            kinds.append(kind)
            offset += size
        return offset == end and b"moov" in kinds and b"mdat" in kinds
    finally:
        os.close(handle)


def _index(store: Store) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files in index/ that readers of the folder see."""
    if store.is_local:
        try:
            entries = os.scandir(store.path(layout.INDEX))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if layout.is_visible(entry.name) and entry.is_file():
                    yield entry.name, entry.stat().st_size
    else:
        # sorted, so that the parts whose clips are in one folder are grouped
        yield from sorted(pair for pair in store.sizes(layout.INDEX).items() if layout.is_visible(pair[0]))


def _adopt(store: Store, existing: ExistingRows, name: str) -> list[str] | None:
    """Write parts for those rows of a misnamed part that no other part holds; None when it is unreadable."""
    try:
        table = read_parquet(store.read_bytes(f"{layout.INDEX}/{name}"))
        rows = table.cast(layout.index_schema(table.column_names)).to_pylist()
    except (pa.ArrowException, ValueError):  # not Parquet, other columns, other types
        return None
    if not all(row["id"] and layout.ITEM_ID.fullmatch(row["item_id"] or "") for row in rows):
        return None
    new = []
    for row in rows:
        item_id, key = row["item_id"], row_key(row["id"])
        if not existing.has_row(item_id, key):
            store.write_bytes(layout.index_path(item_id, key), one_row(row, INDEX_SCHEMA))
            existing.add_row(item_id, key)
            new.append(layout.part_name(item_id, key))
    return new


def _without_clip(store: Store, parts: Iterator[str]) -> list[str]:
    """Those of `parts` whose clip is missing, or is incomplete (on a local disk) or empty (in an object store)."""
    with ThreadPoolExecutor(_THREADS) as pool:
        if store.is_local:
            groups: Iterable[list[str]] = iter(lambda: list(itertools.islice(parts, _BATCH)), [])
            check = _broken_local
        else:
            groups = (list(group) for _, group in itertools.groupby(parts, layout.shard_of_part))
            check = _broken_remote
        broken: list[str] = []
        # a window of groups, so that a million names are not all queued at once
        while window := list(itertools.islice(groups, 2 * _THREADS)):
            for found in pool.map(check, itertools.repeat(store), window):
                broken += found
    return broken


def _broken_local(store: Store, parts: list[str]) -> list[str]:
    root = store.path()
    return [name for name in parts if not is_whole_mp4(f"{root}/{layout.clip_path(layout.item_of_part(name))}")]


def _broken_remote(store: Store, parts: list[str]) -> list[str]:
    sizes = store.sizes(f"{layout.CLIPS}/{layout.shard_of_part(parts[0])}")
    return [name for name in parts if not sizes.get(layout.clip_name(layout.item_of_part(name)))]


def _names_clip(store: Store, name: str) -> bool:
    """Whether the part's row names a clip. A row that was rendered without one is not broken."""
    try:
        table = read_parquet(store.read_bytes(f"{layout.INDEX}/{name}"), columns=["clip"])
    except (pa.ArrowException, ValueError):
        return True
    return table.column(0)[0].as_py() is not None if table.num_rows else True


def _names(names: list[str]) -> str:
    shown = ", ".join(f"{layout.INDEX}/{name}" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more, each of which" if len(names) > _SHOWN else "")
