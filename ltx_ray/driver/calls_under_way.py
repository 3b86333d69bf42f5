"""When the calls under way began, and what calls have cost their items."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from ltx_ray.driver.tracker import RowTracker, TrackedItem
from ltx_ray.pools.pool import Pool
from ltx_ray.records import CallReport
from ltx_ray.stages import Stage


class CallsUnderWay:
    """By item, because an item is in one call at a time. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began: dict[str, float] = {}
        #: Calls by when they are late: (that time, when the call began, its item).
        self._due: list[tuple[float, float, str]] = []

    @property
    def began(self) -> Mapping[str, float]:
        """When the call of each item under way began."""
        return self._began

    def begin(self, item: str, late_after: float) -> None:
        """A call of the item has been dispatched, which is late after so many seconds."""
        now = self._began[item] = self._clock()
        heapq.heappush(self._due, (now + late_after, now, item))

    def late(self) -> Iterator[str]:
        """The items whose calls have become late since this was asked for."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            _, began, item = heapq.heappop(self._due)
            if self._began.get(item) == began:
                yield item

    def account(
        self, tracker: RowTracker, pool: Pool, replica: str, tracked: TrackedItem, stage: Stage, report: CallReport
    ) -> None:
        """A call came back; record what it cost in its item, the events and the metrics."""
        item = tracked.item
        self._began.pop(item.item_id, None)
        tracked.take_call(stage, replica, report, report.seconds * pool.gpus_of_replica)
        tracker.events.emit(
            "preflight_call" if item.preflight else "call",
            role=pool.spec.name, replica=replica, stage=stage, item_id=item.item_id, id=tracked.name,
            start=round(report.started, 3), seconds=round(report.seconds, 3), ok=report.ok,
        )  # fmt: skip
        if report.switches:
            tracker.events.emit(
                "switch", role=pool.spec.name, replica=replica, to=stage,
                seconds=round(report.switch_seconds, 3), clean_weights=report.facts.clean_weights,
            )  # fmt: skip
        if not item.preflight:
            tracker.metrics.call(stage, report.ok, report.seconds, pool.gpus_of_replica)

    def lose(self, tracked: TrackedItem, pool: Pool) -> None:
        """It never came back. Its item has had the GPUs of its replica until now."""
        began = self._began.pop(tracked.item.item_id, None)
        if began is not None:
            tracked.gpu_seconds += (self._clock() - began) * pool.gpus_of_replica
