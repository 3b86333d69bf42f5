"""Writes to the output store on threads of their own, so that a slow store does not block the driver's loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Publisher:
    """Runs writes on `threads` threads, and their callbacks on the caller's thread, in the order of the writes."""

    #: Pending writes beyond which the driver takes no new rows.
    FULL = 256

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="publish")
        self._pending: deque[tuple[Future, Callable[[], None]]] = deque()

    @property
    def pending(self) -> int:
        """Writes whose callback has not run."""
        return len(self._pending)

    def submit(self, write: Callable[[], object], then: Callable[[], None]) -> None:
        """Run `write` soon. `then` runs in a later `poll`, once the write has succeeded."""
        self._pending.append((self._pool.submit(write), then))

    def poll(self, timeout: float = 0.0) -> None:
        """Run the callbacks of finished writes, after waiting up to `timeout` seconds for the oldest write.

        Raises the exception of a write that failed.
        """
        if timeout and self._pending:
            wait([self._pending[0][0]], timeout=timeout)
        while self._pending and self._pending[0][0].done():
            future, then = self._pending.popleft()
            future.result()
            then()

    def close(self, finish: bool) -> None:
        """Wait for the writes that have begun. With `finish`, wait for all and run their callbacks."""
        self._pool.shutdown(wait=True, cancel_futures=not finish)
        if finish:
            self.poll()
