"""When the calls under way began, and what calls that never come back have cost their items."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ltx_ray.driver.tracker import TrackedItem
from ltx_ray.pools.pool import Pool


class CallsUnderWay:
    """By item, because an item is in one call at a time. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began: dict[str, float] = {}

    @property
    def began(self) -> Mapping[str, float]:
        """When the call of each item under way began."""
        return self._began

    def begin(self, item: str) -> None:
        """A call of the item has been dispatched."""
        self._began[item] = self._clock()

    def end(self, item: str) -> None:
        """It came back, and its report says what it cost."""
        self._began.pop(item, None)

    def lose(self, tracked: TrackedItem, pool: Pool) -> None:
        """It never came back. Its item has had the GPUs of its replica until now."""
        began = self._began.pop(tracked.item.item_id, None)
        if began is not None:
            tracked.gpu_seconds += (self._clock() - began) * pool.gpus_of_replica
