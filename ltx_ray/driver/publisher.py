"""Writes to the output store beside the driver's loop, so that a slow store holds up no replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Publisher:
    """Runs writes on `threads` threads; what follows each runs on the caller's thread, in the order of the writes."""

    #: Writes under way beyond which no new rows should be taken.
    FULL = 256

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="publish")
        self._pending: deque[tuple[Future, Callable[[], None]]] = deque()

    @property
    def pending(self) -> int:
        return len(self._pending)

    def submit(self, write: Callable[[], object], then: Callable[[], None]) -> None:
        """Have `write` run soon, and `then` when it has gone well and `poll` is called."""
        self._pending.append((self._pool.submit(write), then))

    def poll(self, timeout: float = 0.0) -> None:
        """Do what follows the writes that are finished, waiting up to `timeout` seconds for the first of them.

        Raises what a write raised.
        """
        if timeout and self._pending:
            wait([self._pending[0][0]], timeout=timeout)
        while self._pending and self._pending[0][0].done():
            future, then = self._pending.popleft()
            future.result()
            then()

    def close(self, finish: bool) -> None:
        """Wait for the writes that have begun; with `finish`, for all of them, and do what follows them."""
        self._pool.shutdown(wait=True, cancel_futures=not finish)
        if finish:
            self.poll()
