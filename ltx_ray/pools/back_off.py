"""What is left alone until a time that doubles with each failure, and then tried again."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class _Timed(Protocol):
    @property
    def until(self) -> float: ...


T = TypeVar("T", bound=_Timed)


class BackOff(Generic[T]):
    """What is left alone now, by name. Seconds are those of the driver's clock."""

    def __init__(self, first_seconds: float, most_seconds: float):
        self._first, self._most = first_seconds, most_seconds
        self.left: dict[str, T] = {}

    def seconds(self, times: int) -> float:
        """How long something is left alone that has failed so many times."""
        return min(self._first * 2.0 ** (times - 1), self._most)

    def due(self, now: float) -> list[T]:
        """Take what is to be tried again now."""
        due = [name for name, kept in self.left.items() if kept.until <= now]
        return [self.left.pop(name) for name in due]

    def earliest(self) -> T | None:
        """Take what would be tried again first."""
        if not self.left:
            return None
        return self.left.pop(min(self.left, key=lambda name: self.left[name].until))
