"""What a crash, a lost disk or a careless copy left in a dataset, put right before a run counts what is done.

Nothing is deleted: a part that cannot stay is renamed within `index/` so that its name starts with "_", which
readers of `part-*` and of the folder pass over.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset.existing import ExistingRows
from ltx_ray.dataset.layout import INDEX_SCHEMA, index_part, row_key
from ltx_ray.dataset.writer import one_row
from ltx_ray.storage.store import Store

PART = re.compile(r"part-([0-9a-f]{32})-([0-9a-f]{8})\.parquet")
_ITEM = re.compile(r"[0-9a-f]{32}")
_THREADS = 8
_BATCH = 2048
#: Names that a message gives of each kind.
_SHOWN = 3


@dataclass
class Repaired:
    """Names (within `index/`) of what was mended, by kind."""

    #: Parts with another name than that of their row, moved aside.
    duplicates: list[str] = field(default_factory=list)
    #: Parts that hold rows which only such a part held.
    published: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    #: Parts whose clip is missing or not whole.
    lost: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.duplicates or self.published or self.unreadable or self.lost)

    def messages(self) -> list[str]:
        told = {
            "holds a row that has a part of its own, or another name than its row's: now index/_duplicate-*":
                self.duplicates,
            "was written for a row that only such a part held": self.published,
            "cannot be read: now index/_unreadable-*; its row is rendered again": self.unreadable,
            "has no whole clip any more: now index/_lost-*; its row is rendered again": self.lost,
        }  # fmt: skip
        return [f"repaired: {_names(names)} {why}" for why, names in told.items() if names]


def repair(store: Store, done: ExistingRows, say: Callable[[str], None]) -> Repaired:
    """Put right what listings (and on a local disk the first bytes of clips) show to be wrong, and `done` with it.

    To be called under the lease, before rows are planned. Raises OSError when the store does not answer.
    """
    repaired = Repaired()
    odd: list[str] = []

    def canonical() -> Iterator[str]:
        for name, size in _index(store):
            if (match := PART.fullmatch(name)) is None:
                odd.append(name)
            elif size:
                yield name
            else:
                repaired.unreadable.append(name)
                done.drop_row(*match.groups())

    broken = _without_clip(store, canonical())
    for name in repaired.unreadable:
        set_aside(store, name, "unreadable")
    for name in sorted(odd):
        if (new := _adopt(store, done, name)) is None:
            repaired.unreadable.append(name)
            set_aside(store, name, "unreadable")
        else:
            repaired.published += new
            repaired.duplicates.append(name)
            set_aside(store, name, "duplicate")
    for name in itertools.chain(broken, _without_clip(store, iter(sorted(repaired.published)))):
        if _wants_clip(store, name):
            done.drop_row(*PART.fullmatch(name).groups())
            repaired.lost.append(name)
            set_aside(store, name, "lost")
    for message in repaired.messages():
        say(message)
    return repaired


def set_aside(store: Store, name: str, why: str) -> None:
    """Rename a part of the index so that readers pass it over. why: "duplicate", "unreadable" or "lost"."""
    store.move(f"index/{name}", f"index/_{why}-{name}")


def is_whole_mp4(path: str) -> bool | None:
    """Whether the top-level boxes of a local file are those of an mp4 and fill it; None when there is no file.

    ISO/IEC 14496-12, 4.2: a box is its size (4 bytes), its type (4 bytes) and, for size 1, its size in 8 bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        end, offset, kinds = os.fstat(handle).st_size, 0, []
        first = os.pread(handle, 64, 0)  # mostly two boxes: a million clips are looked at
        while offset < end:
            head = first[offset : offset + 16] if offset < 48 else os.pread(handle, 16, offset)
            size, kind = int.from_bytes(head[:4]), head[4:8]
            if size == 1:
                size = int.from_bytes(head[8:16])
            elif size == 0:  # up to the end
                size = end - offset
            if size < 8 or not (kinds or kind == b"ftyp"):
                return False
            kinds.append(kind)
            offset += size
        return offset == end and b"moov" in kinds and b"mdat" in kinds
    finally:
        os.close(handle)


def _index(store: Store) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files in `index/` that readers of the folder see."""
    if store.is_local:
        try:
            entries = os.scandir(store.path("index"))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if not entry.name.startswith(("_", ".")) and entry.is_file():
                    yield entry.name, entry.stat().st_size
    else:
        # in order, so that the parts of one folder of clips come together
        yield from sorted(pair for pair in store.sizes("index").items() if not pair[0].startswith(("_", ".")))


def _adopt(store: Store, done: ExistingRows, name: str) -> list[str] | None:
    """Give the rows of an oddly named part that are in no other the parts they should have; None: unreadable."""
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"index/{name}"))).cast(INDEX_SCHEMA)
        rows = table.to_pylist()
    except (pa.ArrowException, ValueError):  # no Parquet, other columns, other types
        return None
    if not all(row["id"] and _ITEM.fullmatch(row["item_id"] or "") for row in rows):
        return None
    new = []
    for row in rows:
        item_id, key = row["item_id"], row_key(row["id"])
        if not done.has_row(item_id, key):
            store.write_bytes(f"index/{index_part(item_id, key)}", one_row(row, INDEX_SCHEMA))
            done.add_row(item_id, key)
            new.append(index_part(item_id, key))
    return new


def _without_clip(store: Store, parts: Iterator[str]) -> list[str]:
    """Those whose clip is not there or not whole (in an object store: empty)."""
    with ThreadPoolExecutor(_THREADS) as pool:
        if store.is_local:
            groups: Iterable[list[str]] = iter(lambda: list(itertools.islice(parts, _BATCH)), [])
            look = _broken_local
        else:
            groups = (list(group) for _, group in itertools.groupby(parts, lambda name: name[5:7]))
            look = _broken_remote
        broken: list[str] = []
        # a window of groups, so that a million names are not all waiting
        while window := list(itertools.islice(groups, 2 * _THREADS)):
            for found in pool.map(look, itertools.repeat(store), window):
                broken += found
    return broken


def _broken_local(store: Store, parts: list[str]) -> list[str]:
    root = store.path("clips")
    return [name for name in parts if not is_whole_mp4(f"{root}/{name[5:7]}/{name[5:37]}.mp4")]


def _broken_remote(store: Store, parts: list[str]) -> list[str]:
    sizes = store.sizes(f"clips/{parts[0][5:7]}")
    return [name for name in parts if not sizes.get(f"{name[5:37]}.mp4")]


def _wants_clip(store: Store, name: str) -> bool:
    """Whether the row of this part says that it has a clip: one that was rendered without is not broken."""
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"index/{name}")), columns=["clip"])
    except (pa.ArrowException, ValueError):
        return True
    return table.column(0)[0].as_py() is not None if table.num_rows else True


def _names(names: list[str]) -> str:
    shown = ", ".join(f"index/{name}" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more, each of which" if len(names) > _SHOWN else "")
