"""How busy the driver's loop is. A loop that is always busy lets replicas wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class LoopTime:
    """Seconds since the loop began, without those in which it waited for events."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        """`clock`, and `cpu_clock` of the loop's thread, in seconds."""
        self._clock, self._cpu_clock = clock, cpu_clock
        self._began, self._waited = clock(), 0.0

    def waiting(self, wait: Callable[[], T]) -> T:
        """Return `wait()`, which waits for events and takes them in. That it computes meanwhile counts as busy."""
        began, cpu_began = self._clock(), self._cpu_clock()
        try:
            return wait()
        finally:
            self._waited += max(self._clock() - began - (self._cpu_clock() - cpu_began), 0.0)

    def busy(self) -> float:
        """Seconds so far."""
        return self._clock() - self._began - self._waited
