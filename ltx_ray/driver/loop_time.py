"""How busy the driver's loop is. A loop that is always busy lets replicas wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class LoopTime:
    """Sums up the seconds in which the loop worked, and did not wait for events."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        """`clock`, and `cpu_clock` of the loop's thread, in seconds."""
        self._clock, self._cpu_clock = clock, cpu_clock
        self._waited, self._busy = 0.0, 0.0
        #: What the clocks and `_waited` were when `busy` was called last.
        self._told = clock(), cpu_clock(), 0.0

    def waiting(self, wait: Callable[[float], T], seconds: float) -> T:
        """Return `wait(seconds)`, which waits for events for so long at most, and takes them in."""
        if not seconds:
            return wait(seconds)
        began = self._clock()
        try:
            return wait(seconds)
        finally:
            self._waited += self._clock() - began

    def busy(self) -> float:
        """Seconds so far. For the loop's own thread.

        Of the time since the last call it counts what was not spent in waits, or the CPU time of the thread, which
        computes in waits too: the larger of both.
        """
        (since, cpu_since, waited), self._told = self._told, (self._clock(), self._cpu_clock(), self._waited)
        now, cpu_now, _ = self._told
        self._busy += max(now - since - (self._waited - waited), cpu_now - cpu_since, 0.0)
        return self._busy
