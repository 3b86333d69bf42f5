"""How many requests this process has made to object stores, by kind and outcome."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

#: (kind, outcome, number). Kinds are what a RetryPolicy is told, such as "reading". Outcomes: "ok"; "missing", when
#: there is no such object; "refused", as by rights or conditions; "error", which may pass, such as throttling.
Counted = tuple[str, str, int]


class RequestCounts:
    """Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, outcome: str) -> None:
        self.add([(kind, outcome, 1)])

    def add(self, counted: Iterable[Counted]) -> None:
        """Take in those of another process."""
        with self._lock:
            for kind, outcome, number in counted:
                self._counts[kind, outcome] += number

    def take(self) -> tuple[Counted, ...]:
        """Those since the last call of this method, so that each is taken once."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return tuple((kind, outcome, number) for (kind, outcome), number in counts.items())


#: Those of this process.
REQUESTS = RequestCounts()
