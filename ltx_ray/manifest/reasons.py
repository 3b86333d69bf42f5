"""Why rows are illegal, counted."""

from __future__ import annotations

from collections import Counter

from ltx_ray.manifest.rules import IllegalRow

#: Reasons that are named, and the most that are counted.
_COMMONEST, _MOST_REASONS = 5, 1000


class Reasons:
    """Counts the reasons of illegal rows, up to a number of different ones."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def take(self, row: IllegalRow) -> None:
        for problem in row.problems:
            reason = f"{problem.column}: legal: {problem.legal}"
            if reason in self._counts or len(self._counts) < _MOST_REASONS:
                self._counts[reason] += 1

    def commonest(self) -> str:
        """The commonest reasons with their numbers, as one text."""
        return "; ".join(f"{count:,} of {reason}" for reason, count in self._counts.most_common(_COMMONEST))
