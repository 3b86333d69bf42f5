"""When the calls under way began, and what calls have cost their items."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ltx_ray.driver.tracker import RowTracker, TrackedItem
from ltx_ray.pools.pool import Pool
from ltx_ray.records import CallReport
from ltx_ray.stages import Stage

#: Seconds between two looks at which calls are late.
_PERIOD = 1.0


class CallsUnderWay:
    """By item, because an item is in one call at a time. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began: dict[str, float] = {}
        #: When the call of an item becomes late; not of those that `late` has told.
        self._late_at: dict[str, float] = {}
        self._looked = -math.inf

    @property
    def began(self) -> Mapping[str, float]:
        """When the call of each item under way began."""
        return self._began

    def begin(self, item: str, late_after: float) -> None:
        """A call of the item has been dispatched. `late_after`: the seconds after which it is late."""
        now = self._began[item] = self._clock()
        self._late_at[item] = now + late_after

    def late(self) -> list[str]:
        """The items whose calls have become late, each once. It looks once per second and is empty in between."""
        now = self._clock()
        if now - self._looked < _PERIOD:
            return []
        self._looked = now
        late = [item for item, time in self._late_at.items() if time <= now]
        for item in late:
            del self._late_at[item]
        return late

    def account(
        self, tracker: RowTracker, pool: Pool, replica: str, tracked: TrackedItem, stage: Stage, report: CallReport
    ) -> None:
        """A call came back; record what it cost in its item, the events and the metrics."""
        item = tracked.item
        self._began.pop(item.item_id, None)
        self._late_at.pop(item.item_id, None)
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
        if (seconds := report.facts.start_seconds) is not None:
            tracker.events.emit("start_finished", role=pool.spec.name, replica=replica, seconds=seconds)

    def lose(self, tracked: TrackedItem, pool: Pool) -> None:
        """It never came back. Its item has had the GPUs of its replica until now."""
        self._late_at.pop(tracked.item.item_id, None)
        began = self._began.pop(tracked.item.item_id, None)
        if began is not None:
            tracked.gpu_seconds += (self._clock() - began) * pool.gpus_of_replica
