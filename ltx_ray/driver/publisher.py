"""Commits rows in groups on a thread of its own, so that a slow store does not block the driver's loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

#: Rows that are committed at once as soon as the thread is free, and the most in one commit.
_ROWS, _MOST_ROWS = 64, 1000
#: Seconds after which fewer are committed. The driver's loop looks every half second.
_SECONDS = 1.5

Entry = tuple[Callable[[], object], Callable[[], None]]


class Log(Protocol):
    """What gathers rows and commits them: `dataset.row_log.RowLog`."""

    @property
    def fold_is_due(self) -> bool: ...

    def commit(self) -> None: ...

    def fold(self) -> None: ...


@dataclass
class Publisher:
    """Adds rows to `log` and commits them, and runs callbacks of the rows on the caller's thread, in their order."""

    log: Log
    clock: Callable[[], float] = time.monotonic
    _waiting: list[Entry] = field(default_factory=list, init=False)
    _since: float = field(default=0.0, init=False)
    _committing: tuple[Future[None], list[Entry]] | None = field(default=None, init=False)
    _folding: Future[None] | None = field(default=None, init=False)

    #: Pending rows beyond which the driver takes no new ones.
    FULL = 2048

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")

    @property
    def pending(self) -> int:
        """Rows whose callback has not run."""
        return len(self._waiting) + (len(self._committing[1]) if self._committing else 0)

    @property
    def committing(self) -> bool:
        """Whether callbacks are to be expected soon."""
        return self._committing is not None

    def submit(self, write: Callable[[], object], then: Callable[[], None]) -> None:
        """Have `write` add to the log soon, on another thread. `then` runs in a later `poll`, after the commit."""
        if not self._waiting:
            self._since = self.clock()
        self._waiting.append((write, then))

    def poll(self, timeout: float = 0.0, flush: bool = False) -> None:
        """Begin a commit that is due, and run the callbacks of the one that has ended.

        `flush`: a commit is due as soon as a row waits. `timeout`: seconds to wait for the commit under way. Raises
        the exception of a commit or a fold that failed.
        """
        self._begin(flush)
        if timeout and self._committing is not None:
            wait([self._committing[0]], timeout=timeout)
        if self._committing is not None and self._committing[0].done():
            (future, entries), self._committing = self._committing, None
            future.result()
            for _, then in entries:
                then()
            self._fold()
            self._begin(flush)
        if self._folding is not None and self._folding.done():
            folding, self._folding = self._folding, None
            folding.result()

    def _begin(self, flush: bool) -> None:
        if self._committing is not None or not self._waiting:
            return
        if flush or len(self._waiting) >= _ROWS or self.clock() - self._since >= _SECONDS:
            entries, self._waiting = self._waiting[:_MOST_ROWS], self._waiting[_MOST_ROWS:]
            self._committing = self._thread.submit(self._commit, entries), entries

    def _commit(self, entries: list[Entry]) -> None:
        for write, _ in entries:
            write()
        self.log.commit()

    def _fold(self) -> None:
        if self._folding is None and self.log.fold_is_due:
            self._folding = self._thread.submit(self.log.fold)

    def close(self, finish: bool) -> None:
        """Wait for the commit that has begun. With `finish`, commit all rows and run their callbacks."""
        while finish and self.pending:
            self.poll(timeout=60.0, flush=True)
        self._thread.shutdown(wait=True)
        self._folding = None  # If it failed, the end of the run folds again, and says why when that fails, too.
