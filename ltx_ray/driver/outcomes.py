"""How the last rows of a run ended, and whether too many of them have failed."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

#: Rows that are looked at.
_LAST = 500
#: Without a limit of the user's: the part of the rows that may fail for one reason, and the rows before it counts.
_DEFAULT, _DEFAULT_LEAST = 0.5, 100
#: Rows before a limit of the user's counts.
_LEAST = 10
#: What rows can fail of, in words.
_KINDS = {"row": "by their own fault", "infrastructure": "because of the infrastructure"}


class TooManyFailed(NamedTuple):
    """A part of the last rows, more than the limit, has failed for one reason."""

    part: float
    rows: int
    why: str
    limit: float


class Outcomes:
    """`limit`: the part of the rows that may fail, as the user gave it; None for half, without illegal rows."""

    def __init__(self, limit: float | None):
        self._given, self._limit = limit is not None, _DEFAULT if limit is None else limit
        self._last: deque[str] = deque(maxlen=_LAST)
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, rows: int = 1) -> None:
        """So many rows are rendered, or have failed: "row" or "infrastructure"."""
        for _ in range(min(rows, _LAST)):
            if len(self._last) == _LAST:
                self._counts[self._last[0]] -= 1
            self._last.append(kind)
            self._counts[kind] += 1

    def add_illegal(self, rows: int) -> None:
        """So many rows were illegal. They fail by their own fault, and count when the user has given a limit."""
        if self._given:
            self.add("row", rows)

    def too_many_failed(self) -> TooManyFailed | None:
        """Which rows are too many, if any are."""
        seen = len(self._last)
        if seen < (_LEAST if self._given else _DEFAULT_LEAST):
            return None
        if (seen - self._counts["rendered"]) / seen <= self._limit:
            return None  # Nor are those of one kind. This is asked at every turn, and few rows fail.
        for kind, words in _KINDS.items():
            part = self._counts[kind] / seen
            if part > self._limit:
                return TooManyFailed(part, seen, words, self._limit)
        return None
