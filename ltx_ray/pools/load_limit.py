"""How many replicas may load the model at once.

All places are asked for at once, so that an autoscaler sees the whole demand. Weights may come from a shared disk,
though, which a thousand readers would bring to a standstill. More replicas load at once as long as loading takes no
longer.
"""

from __future__ import annotations

import math

#: Replicas that load at once before any load has been measured, and the fewest.
_FIRST, _FEWEST = 64, 16
#: By how much the limit grows once as many have loaded as fast as the fastest.
_GROWTH = 8
#: A load is slow when it takes longer than this many times the fastest, and this many seconds.
_SLOW_TIMES, _SLOW_SECONDS = 2.0, 10.0


class LoadLimit:
    """Counts the replicas that load, and says whether one more may begin."""

    def __init__(self) -> None:
        self.limit = _FIRST
        self._loading = self._fast = 0
        self._fastest = math.inf

    @property
    def open(self) -> bool:
        """Whether one more may begin to load."""
        return self._loading < self.limit

    def begin(self) -> None:
        self._loading += 1

    def end(self, seconds: float | None) -> None:
        """A load has ended after `seconds`, or failed (None)."""
        self._loading -= 1
        if seconds is None:
            return
        self._fastest = min(self._fastest, seconds)
        if seconds > max(_SLOW_TIMES * self._fastest, _SLOW_SECONDS):
            # The source is busy. Those that wait begin as others end.
            self.limit, self._fast = max(_FEWEST, min(self.limit, self._loading)), 0
            return
        self._fast += 1
        if self._fast >= self.limit / _GROWTH:
            self.limit, self._fast = self.limit * _GROWTH, 0
