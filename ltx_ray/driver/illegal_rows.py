"""What a run says of illegal rows: each of the first ones, and of more the commonest reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ltx_ray.manifest.rules import IllegalRow

#: Rows that are said one by one.
SHOWN = 100
#: Reasons that are said at the end, and the most that are counted.
_COMMONEST, _MOST_REASONS = 5, 1000


class IllegalRows:
    """Counts the reasons of illegal rows. `say` takes lines for the user."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._count = 0
        self._reasons: Counter[str] = Counter()

    def take(self, row: IllegalRow) -> bool:
        """Count a row; True for the first ones, which are said."""
        self._count += 1
        for problem in row.problems:
            reason = f"{problem.column}: legal: {problem.legal}"
            if reason in self._reasons or len(self._reasons) < _MOST_REASONS:
                self._reasons[reason] += 1
        if self._count <= SHOWN:
            for message in row.messages():
                self.say(message)
        return self._count <= SHOWN

    def summarize(self) -> None:
        """Say the commonest reasons if not every row was said."""
        if self._count > SHOWN:
            commonest = "; ".join(f"{count:,} of {reason}" for reason, count in self._reasons.most_common(_COMMONEST))
            self.say(f"{self._count:,} rows are illegal, all of them in failed/; the commonest reasons: {commonest}")
