"""What the replicas of each stage wait for: a share of their time, by sampling.

A replica is idle because no item is there for its stage yet, because what it would make has no place in the queue of
the next stage, or because the results in flight take all the memory that they may. `stage2 waits for decode` means the
second: decode is what bounds the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ltx_ray.driver.events import EventLog
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.run_metrics import RunMetrics
from ltx_ray.stages import Stage

#: Seconds between two samples.
_PERIOD = 0.5
#: A sample stands for no longer than this, such as after the driver was stopped.
_MOST_SECONDS = 60.0
#: Seconds between two events.
_REPORT_SECONDS = 60.0
#: Shares below this are not worth a word.
_WORTH_SAYING = 0.02


class WaitShares:
    """Shares of the time of a stage's replicas, from 0 to 1, by (stage, what it waits for)."""

    def __init__(self, shares: Mapping[tuple[Stage, str], float]):
        self._shares = shares

    def of(self, *causes: str) -> float:
        """The largest share of any stage that waits for one of `causes`."""
        return max((share for (_, cause), share in self._shares.items() if cause in causes), default=0.0)

    def by_stage(self) -> dict[str, dict[str, float]]:
        """The shares that are worth a word, as an event has them."""
        told: dict[str, dict[str, float]] = {}
        for (stage, cause), share in sorted(self._shares.items()):
            if share >= _WORTH_SAYING:
                told.setdefault(str(stage), {})[cause] = round(share, 3)
        return told


class Waits:
    """Sums up samples. Times are of the driver's clock."""

    def __init__(self) -> None:
        self._sampled: float | None = None
        #: Seconds of replicas: those that waited, by (stage, cause), and all, by stage.
        self.waited: Counter[tuple[Stage, str]] = Counter()
        self.there: Counter[Stage] = Counter()

    def look(self, policy: Policy, now: float) -> None:
        """Take a sample if one is due."""
        if self._sampled is None:
            self._sampled = now
            return
        seconds = min(now - self._sampled, _MOST_SECONDS)
        if seconds < _PERIOD:
            return
        self._sampled = now
        for stage, servers, idle, cause in policy.idleness():
            self.there[stage] += seconds * servers  # type: ignore[assignment]  # Counters take floats.
            if idle:
                self.waited[stage, cause] += seconds * idle  # type: ignore[assignment]


class WaitWindow:
    """The shares since it was read last."""

    def __init__(self, waits: Waits):
        self._waits = waits
        self._waited, self._there = Counter(waits.waited), Counter(waits.there)

    def read(self) -> WaitShares:
        """The shares, which begin anew."""
        shares = self.so_far()
        self._waited, self._there = Counter(self._waits.waited), Counter(self._waits.there)
        return shares

    def so_far(self) -> WaitShares:
        waited = {key: seconds - self._waited[key] for key, seconds in self._waits.waited.items()}
        there = {stage: seconds - self._there[stage] for stage, seconds in self._waits.there.items()}
        return WaitShares({key: seconds / there[key[0]] for key, seconds in waited.items() if there[key[0]] > 0})


class WaitReport:
    """Tells a run's events and metrics what its stages waited for in the last minute, and keeps that for people."""

    def __init__(self, waits: Waits, events: EventLog, metrics: RunMetrics):
        self._waits, self._events, self._metrics = waits, events, metrics
        self._minute, self._whole = WaitWindow(waits), WaitWindow(waits)
        self._told: float | None = None
        #: Of the last minute.
        self.shares: dict[str, dict[str, float]] = {}

    def tell(self, now: float, ended: bool = False) -> None:
        """Emit an event when a minute has passed since the last one. Metrics follow then, and at the end of the run."""
        if self._told is None:
            self._told = now
        elif now - self._told >= _REPORT_SECONDS:
            self._told = now
            self.shares = self._minute.read().by_stage()
            self._events.emit("waits", shares=self.shares)
            ended = True
        if ended:
            for (stage, cause), seconds in self._waits.waited.items():
                self._metrics.reach("ltx_ray_waited_seconds", seconds, stage, cause)

    def whole_run(self) -> dict[str, dict[str, float]]:
        """The shares of the whole run so far."""
        return self._whole.so_far().by_stage()
