"""A file of known size that is read by ranges. No Arrow."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class RangeFile(io.RawIOBase):
    """`read(start, count)` returns up to `count` bytes from byte `start` on, one at least where there are some."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self._size, self._read, self._position = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if not count:
            return 0
        data = self._read(self._position, count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
