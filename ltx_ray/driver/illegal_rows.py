"""What a run says of illegal rows: each of the first ones, and of more the commonest reasons."""

from __future__ import annotations

from collections.abc import Callable

from ltx_ray.manifest.reasons import Reasons
from ltx_ray.manifest.rules import IllegalRow

#: Rows that are said one by one.
SHOWN = 100


class IllegalRows:
    """Counts the reasons of illegal rows. `say` takes lines for the user."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._count = 0
        self._reasons = Reasons()

    def take(self, row: IllegalRow) -> bool:
        """Count a row; True for the first ones, which are said."""
        self._count += 1
        self._reasons.take(row)
        if self._count <= SHOWN:
            for message in row.messages():
                self.say(message)
        return self._count <= SHOWN

    def summarize(self) -> None:
        """Say the commonest reasons if not every row was said."""
        if self._count > SHOWN:
            reasons = self._reasons.commonest()
            self.say(f"{self._count:,} rows are illegal, all of them in failed/; the commonest reasons: {reasons}")
