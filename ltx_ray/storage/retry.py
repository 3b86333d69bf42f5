"""Retries for a store that throttles, disconnects or stalls: which errors are retried, and for how long."""

from __future__ import annotations

import errno
import io
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from ltx_ray.storage.range_file import RangeFile
from ltx_ray.storage.reasons import reason
from ltx_ray.storage.requests import REQUESTS

T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 10.0
#: Bytes that a file in an object store reads ahead: a request costs as much as a megabyte.
_READ_AHEAD = 2**20
#: Errors that no retry can fix. Any other may pass: space is freed on a full disk, a server is restarted.
_PERMANENT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EXDEV, errno.EBADF,
}  # fmt: skip
#: The same for object stores, whose errors have no number but a message. S3 answers a slow request with 400
#: RequestTimeout, and a token that is about to be renewed with 400 ExpiredToken. For both, pyarrow's message has the
#: name instead of the status, so neither matches here.
_PERMANENT_WORDS = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
    r"|HTTP status 30[178]|HTTP status 40[01345]|[Bb]ucket '[^']*' not found"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND"
    r"|path '.*' is a directory"
)
_GONE = re.compile("NO_SUCH_KEY|RESOURCE_NOT_FOUND")


def is_permanent(error: OSError) -> bool:
    """Whether a retry cannot help: the file is missing, forbidden or not a file, or the store cannot do it at all."""
    if isinstance(error, FileNotFoundError | PermissionError | io.UnsupportedOperation):
        return True
    return error.errno in _PERMANENT or (error.errno is None and bool(_PERMANENT_WORDS.search(str(error))))


class StoreUnavailable(OSError):
    """A store failed for as long as it is retried. What it holds may be whole."""


class RetryPolicy:
    """Repeats failing calls for up to `seconds`, with waits that double from 0.25 s to 10 s, jittered by half.

    `clock` (monotonic seconds) and `wait` (sleep) can be replaced for tests.
    """

    def __init__(
        self,
        uri: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.uri, self.seconds, self.clock, self.wait = uri, seconds, clock, wait

    def __call__(self, doing: str, relative: str, call: Callable[[], T]) -> T:
        """Return `call()`, repeated while it raises an OSError that may pass; `call` must be idempotent.

        Raises a permanent error as it is. When the time is up, raises a StoreUnavailable that names the store, what was
        done (`doing`, such as "writing") to which file, for how long, and the last error.
        """
        began, tries, pause = self.clock(), 0, _FIRST_WAIT
        while True:
            tries += 1
            try:
                return self.once(doing, call)
            except OSError as error:
                if is_permanent(error):
                    raise
                spent = self.clock() - began
                if spent >= self.seconds:
                    what = f"{self.uri}: {doing} {relative}" if relative else f"{self.uri}: {doing}"
                    often = "once" if tries == 1 else f"{tries} times in {spent:.0f} s"
                    raise StoreUnavailable(f"{what} failed (tried {often}): {reason(error)}") from error
            # jitter, so that a thousand workers that were throttled together do not retry together
            self.wait(min(pause * random.uniform(0.5, 1.0), max(0.0, self.seconds - spent)))
            pause = min(2 * pause, _LONGEST_WAIT)

    def once(self, doing: str, call: Callable[[], T]) -> T:
        """Return `call()`, which is one request, and count it when the store is an object store."""
        outcome = "refused"
        try:
            value = call()
            outcome = "ok"
            return value
        except OSError as error:
            gone = _GONE.search(str(error))  # deleted between the lookup and the read
            if gone or isinstance(error, FileNotFoundError):
                outcome = "missing"
            elif not is_permanent(error):
                outcome = "error"
            if gone:
                raise FileNotFoundError(str(error)) from error
            raise
        finally:
            if "://" in self.uri:
                REQUESTS.count(doing, outcome)


class _RetryingFile(RangeFile):
    """An object opened for reading. Each read is retried on its own."""

    def __init__(self, inner: pafs.FileSystem, path: str, retry: RetryPolicy):
        file = self._file = retry("opening", path, lambda: inner.open_input_file(path))
        super().__init__(file.size(), lambda at, count: retry("reading", path, lambda: file.read_at(count, at)))

    def close(self) -> None:
        self._file.close()
        super().close()


class _RetryingHandler(pafs.FileSystemHandler):
    """The handler of a read-only filesystem. Only `Store` writes."""

    def __init__(self, inner: pafs.FileSystem, retry: RetryPolicy):
        self._inner, self._retry = inner, retry

    def get_type_name(self) -> str:
        return f"retrying+{self._inner.type_name}"

    def normalize_path(self, path: str) -> str:
        return self._inner.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._retry("looking up", ", ".join(paths), lambda: self._inner.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._retry("listing", selector.base_dir, lambda: self._inner.get_file_info(selector))

    def open_input_file(self, path: str) -> pa.PythonFile:
        raw = _RetryingFile(self._inner, path, self._retry)
        return pa.PythonFile(io.BufferedReader(raw, _READ_AHEAD), mode="r")

    open_input_stream = open_input_file

    def _refuse(self, *args: Any) -> None:
        raise NotImplementedError("this filesystem is for reading; Store writes")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse


def retrying_reader(inner: pafs.FileSystem, retry: RetryPolicy) -> pafs.FileSystem:
    """`inner` for reading, with every lookup, listing and read retried."""
    return pafs.PyFileSystem(_RetryingHandler(inner, retry))
