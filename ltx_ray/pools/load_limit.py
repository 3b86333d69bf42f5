"""How many replicas may load the model at once.

All places are asked for at once, so that an autoscaler sees the whole demand. Weights may come from a shared disk,
though, which a thousand readers would bring to a standstill. More replicas load at once as long as loading takes no
longer: replicas of one pool read the same bytes, so that their seconds tell the bytes a second of each.
"""

from __future__ import annotations

#: Replicas that load at once before any load has been measured, and the fewest.
_FIRST, _FEWEST = 64, 16
#: By how much the limit grows once as many have loaded as fast as the fastest.
_GROWTH = 8
#: A load is slow when it takes longer than this many times the fastest, and this many seconds.
_SLOW_TIMES, _SLOW_SECONDS = 2.0, 10.0


class LoadLimit:
    """Counts the replicas that load, and says whether one more may begin. `fixed`: so many at once, always."""

    def __init__(self, fixed: int | None = None) -> None:
        self.limit = _FIRST if fixed is None else fixed
        self._fixed = fixed is not None
        self._loading = self._fast = 0
        #: Seconds of the fastest load, by pool.
        self._fastest: dict[str, float] = {}

    @property
    def open(self) -> bool:
        """Whether one more may begin to load."""
        return self._loading < self.limit

    def begin(self) -> None:
        self._loading += 1

    def end(self, pool: str, seconds: float | None) -> None:
        """A load of a replica of `pool` has ended after `seconds`, or failed (None)."""
        self._loading -= 1
        if seconds is None or self._fixed:
            return
        fastest = self._fastest[pool] = min(self._fastest.get(pool, seconds), seconds)
        if seconds > max(_SLOW_TIMES * fastest, _SLOW_SECONDS):
            # The source is busy. Those that wait begin as others end.
            self.limit, self._fast = max(_FEWEST, min(self.limit, self._loading)), 0
            return
        self._fast += 1
        if self._fast >= self.limit / _GROWTH:
            self.limit, self._fast = self.limit * _GROWTH, 0
