"""Items that wait before a stage, oldest first, grouped by the weights that a replica must have merged for them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import NamedTuple


class Candidate(NamedTuple):
    """The oldest item of a group: its order, its group, and how often younger items have been served before it."""

    order: int
    group: Hashable
    passed_over: int


class Choice(NamedTuple):
    """The item to serve: the preference of its group, its order and its group."""

    preference: int
    order: int
    group: Hashable


class FairQueue:
    """A queue that can be served out of order, and that counts how often its oldest item has been passed over."""

    def __init__(self) -> None:
        self._heaps: dict[Hashable, list[tuple[int, str, int, int]]] = {}
        self._size = self._served = 0
        self._youngest = -1

    def __len__(self) -> int:
        return self._size

    def has(self, group: Hashable) -> bool:
        """Whether an item of this group waits."""
        return group in self._heaps

    @property
    def only_group(self) -> tuple[Hashable, ...]:
        """The group that all items share, in a tuple because it may be None. Empty when there are several, or none."""
        return tuple(self._heaps) if len(self._heaps) == 1 else ()

    def push(self, item: str, order: int, group: Hashable) -> None:
        """`order` is the item's place: an item that comes back to the queue goes before younger ones."""
        # The items before a new one are served before it without passing it over. One that comes back may have none.
        before = self._size if order > self._youngest else 0
        self._youngest = max(self._youngest, order)
        heapq.heappush(self._heaps.setdefault(group, []), (order, item, self._served, before))
        self._size += 1

    def oldest(self) -> Candidate:
        """The oldest item of all."""
        group = min(self._heaps, key=lambda g: self._heaps[g][0])
        order, _, served, before = self._heaps[group][0]
        return Candidate(order, group, self._served - served - before)

    def best(self, preference: Callable[[Hashable], int]) -> Choice:
        """The item to serve: the oldest item of all groups with the lowest preference."""
        group = min(self._heaps, key=lambda g: (preference(g), self._heaps[g][0]))
        return Choice(preference(group), self._heaps[group][0][0], group)

    def pop(self, group: Hashable) -> str:
        """Take the oldest item of `group` out."""
        heap = self._heaps[group]
        item = heapq.heappop(heap)[1]
        if not heap:
            del self._heaps[group]
        self._size -= 1
        self._served += 1
        return item
