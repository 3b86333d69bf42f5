"""Items that wait before a stage, oldest first, grouped by what a replica must have merged for them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable


class FairQueue:
    """A queue that can be served out of order, and knows when its oldest item has been passed over too often."""

    def __init__(self) -> None:
        self._heaps: dict[Hashable, list[tuple[int, str, int, int]]] = {}
        self._size = self._served = 0
        self._youngest = -1

    def __len__(self) -> int:
        return self._size

    def has(self, kind: Hashable) -> bool:
        """Whether an item of this kind waits."""
        return kind in self._heaps

    def push(self, item: str, order: int, kind: Hashable) -> None:
        """`order` is the item's place in the line: one that comes back goes before younger ones."""
        # those ahead of it are served before it without passing it over; one that comes back may have none
        ahead = self._size if order > self._youngest else 0
        self._youngest = max(self._youngest, order)
        heapq.heappush(self._heaps.setdefault(kind, []), (order, item, self._served, ahead))
        self._size += 1

    def oldest(self) -> tuple[int, Hashable, int]:
        """(order, kind, how often it has been passed over) of the oldest item."""
        kind = min(self._heaps, key=lambda k: self._heaps[k][0])
        order, _, served, ahead = self._heaps[kind][0]
        return order, kind, self._served - served - ahead

    def best(self, preference: Callable[[Hashable], int]) -> tuple[int, int, Hashable]:
        """(preference, order, kind) of the item to serve: lowest preference of its kind first, then the oldest."""
        kind = min(self._heaps, key=lambda k: (preference(k), self._heaps[k][0]))
        return preference(kind), self._heaps[kind][0][0], kind

    def pop(self, kind: Hashable) -> str:
        """Take the oldest item of `kind` out."""
        heap = self._heaps[kind]
        item = heapq.heappop(heap)[1]
        if not heap:
            del self._heaps[kind]
        self._size -= 1
        self._served += 1
        return item
