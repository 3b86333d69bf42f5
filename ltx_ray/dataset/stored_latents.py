"""Which items have stored latents. Nothing of latents/ is read until it is asked, and never millions of names."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

from ltx_ray.dataset import layout
from ltx_ray.dataset.parts import ITEM_BYTES
from ltx_ray.storage.id_table import IdTable
from ltx_ray.storage.store import Store

T = TypeVar("T")

#: Names of an object store that are listed at most: ten requests, one after the other. Ten times as many would keep the
#: first row waiting for seven seconds, where a look-up of each item keeps none.
_MOST_NAMES = 10_000
#: Items that are looked up at once, ahead of their use.
_AHEAD, _THREADS = 64, 16
#: Seconds for which a look-up is retried. A run outlives a store that does not answer for so long.
_RETRY_SECONDS = 600.0


class StoredLatents:
    """The items with latents below latents/, as they are there when they are looked up.

    On a disk, each item is looked up. In an object store, the names are listed at the first question. If there are more
    than `most`, each item is looked up there, too, and `prefetched` hides how long that takes. Without a store there
    are none. Raises OSError when the store does not answer.
    """

    def __init__(self, store: Store | None, most: int = _MOST_NAMES):
        self._given, self._most = store, most
        self._asked: dict[str, Future[bool]] = {}

    @cached_property
    def _store(self) -> Store | None:
        return None if self._given is None else self._given.retrying_for(_RETRY_SECONDS)

    @cached_property
    def any(self) -> bool:
        """Whether any item had some when this was asked first."""
        return next(self._names(), None) is not None

    def has(self, item_id: str) -> bool:
        if self._listed is None:
            asked = self._asked.get(item_id)
            return self._look_up(item_id) if asked is None else asked.result()
        item = bytes.fromhex(item_id)
        return self._listed.has(item[:8], item[8:])

    def prefetched(self, entries: Iterator[T], item_of: Callable[[T], str | None]) -> Iterator[T]:
        """`entries` as they are, of which the next are looked up meanwhile if each item has to be.

        item_of: the item that will be asked for, or None.
        """
        if self._given is None or self._given.is_local:
            yield from entries
            return
        waiting: deque[tuple[T, str | None]] = deque()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="latents") as pool:
            for entry in entries:
                item_id = item_of(entry)
                if item_id is not None and self._listed is None and item_id not in self._asked:
                    self._asked[item_id] = pool.submit(self._look_up, item_id)
                waiting.append((entry, item_id))
                while len(waiting) > (_AHEAD if self._asked else 0):
                    yield from self._next(waiting)
            while waiting:
                yield from self._next(waiting)

    def _next(self, waiting: deque[tuple[T, str | None]]) -> Iterator[T]:
        """The entry that has waited longest. Its answer is kept until the one after it is wanted."""
        entry, item_id = waiting.popleft()
        yield entry
        if item_id is not None:
            self._asked.pop(item_id, None)

    @cached_property
    def _listed(self) -> IdTable | None:
        """The items, or None if each has to be looked up."""
        items = IdTable(ITEM_BYTES, cap=None)
        if not self.any:
            return items
        assert self._store is not None
        if self._store.is_local:
            return None
        names = list(itertools.islice(self._names(), self._most + 1))
        if len(names) > self._most:
            return None
        items.extend(bytes.fromhex("".join(names)))
        return items

    def _names(self) -> Iterator[str]:
        """The items of all files of latents, in no order."""
        if self._store is not None:
            for name in self._store.names(layout.LATENTS):
                match = layout.LATENTS_FILE.fullmatch(name.rpartition("/")[2])
                if match is not None and name == layout.latents_path(match.group(1)).partition("/")[2]:
                    yield match.group(1)

    def _look_up(self, item_id: str) -> bool:
        assert self._store is not None
        path = layout.latents_path(item_id)
        if self._store.is_local:
            return self._store.exists(path)
        try:
            self._store.objects.head(path)  # `exists` would also list what is below a path that it does not find
        except FileNotFoundError:
            return False
        return True
