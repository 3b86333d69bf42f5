"""Images of the rows that come next are read by a pool of threads, so that the driver's loop seldom waits for a store.

An image is read to check it and to hash it, which takes two or three requests of an object store. Rows are still taken
in their order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

T = TypeVar("T")
#: The location of an image, and the crf that it is compressed with.
Use: TypeAlias = tuple[str, int]

#: Threads that read, and rows ahead whose images they read. With 0.2 s for an image that is 80 images a second.
_THREADS, _DEPTH = 16, 64


class ImageLookAhead:
    """Runs `digest` ahead of the rows that need it. `depth`: how many rows; 0 reads an image when it is needed."""

    def __init__(self, digest: Callable[[str, int], str], depth: int = _DEPTH):
        self._read, self._depth = digest, depth
        # It has no threads until the first image.
        self._pool: ThreadPoolExecutor | None = None
        self._reading: dict[Use, Future[str]] = {}
        #: How many rows of the window need an image.
        self._users: Counter[Use] = Counter()
        #: Images of the row that comes next.
        self._next: tuple[Use, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the images of the next row have been read, so that taking the row does not wait."""
        if not self._next:
            return True
        return all(future.done() for use in self._next if (future := self._reading.get(use)) is not None)

    def digest(self, path: str, crf: int) -> str:
        """What `digest` of the constructor returns or raises for an image; waits while a thread is reading it."""
        future = self._reading.get((path, crf))
        return self._read(path, crf) if future is None else future.result()

    def over(self, rows: Iterable[T], uses: Callable[[T], tuple[Use, ...]]) -> Iterator[T]:
        """`rows` in their order, of which the images of the next ones are read meanwhile. `uses`: those of a row."""
        window: deque[tuple[T, tuple[Use, ...]]] = deque()
        try:
            for row in rows:
                used = uses(row)
                if not used and not window:
                    # Rows without images, as those of most manifests, need no window.
                    yield row
                    continue
                self._begin(used)
                window.append((row, used))
                while len(window) > self._depth or (window and not self._users):
                    yield from self._leave(window)
            while window:
                yield from self._leave(window)
        finally:
            # Nobody takes the rest, if there is any.
            for _, used in window:
                self._end(used)
            self._next = ()

    def _leave(self, window: deque[tuple[T, tuple[Use, ...]]]) -> Iterator[T]:
        row, used = window.popleft()
        self._next = window[0][1] if window else ()
        try:
            yield row
        finally:
            self._end(used)

    def _begin(self, used: tuple[Use, ...]) -> None:
        self._users.update(used)
        if not self._depth:
            return
        for use in used:
            if use not in self._reading:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
                self._reading[use] = self._pool.submit(self._read, *use)

    def _end(self, used: tuple[Use, ...]) -> None:
        self._users.subtract(used)
        for use in used:
            if not self._users[use]:
                del self._users[use]
                if (future := self._reading.pop(use, None)) is not None:
                    future.cancel()
