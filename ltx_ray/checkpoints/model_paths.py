"""Paths of model files: on this machine, or URIs (s3://, gs://, hf://), whose files are read by ranges.

What looks at a model's files from outside goes through here, so that it says the same of a local copy and of a URI.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from ltx_ray.storage.credentials import without_credentials
from ltx_ray.storage.locations import recorded, split_options
from ltx_ray.storage.range_file import RangeFile

#: Bytes of a request, and blocks that stay in memory: headers are looked at several times.
_BLOCK_BYTES = 4 * 2**20
_BLOCKS = 16
#: Ranges that are asked for at once. A store gives 60 to 100 MB/s to each.
RANGES_AT_ONCE = 32

#: Commits of repositories of the Hub, by repository and revision: a branch may go on while its files are looked at.
_commits: dict[tuple[str, str | None], str] = {}


class RemoteFiles(Protocol):
    """Files below a URI. ObjectClient and HubFiles document the methods."""

    def listed(self, folder: str) -> Iterator[tuple[str, int, str]]: ...
    def head(self, relative: str) -> tuple[int, str]: ...
    def read_range(self, relative: str, start: int, length: int, version: str) -> bytes: ...


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def look_again() -> None:
    """Forget what was read of URIs: from now on they are looked at as they are."""
    for cached in (remote_files, _head, _below, _block):
        cached.cache_clear()
    _commits.clear()


def is_file(path: str) -> bool:
    """Whether there is such a file. Raises ValueError when the store of a URI does not say."""
    return _head(path) is not None if is_remote(path) else os.path.isfile(path)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a folder; in a store, whether files are below it. Raises ValueError as above."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.isdir(path)
    # Of what is a file, nothing is listed, which takes a right of its own.
    return _head(path) is None and bool(_below(path))


def names(folder: str) -> list[str]:
    """Names of what lies in `folder` itself, sorted."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    return sorted({name.partition("/")[0] for name in _below(folder)})


def files_below(folder: str) -> list[str]:
    """Paths of all files below `folder`, relative to it, in the order of their parts."""
    if is_remote(folder):
        found: Iterable[str] = _below(folder)
    else:
        # followlinks: a component of a model may be a link to a folder elsewhere
        walked = (os.path.join(root, name) for root, _, inside in os.walk(folder, followlinks=True) for name in inside)
        found = (os.path.relpath(path, folder) for path in walked if os.path.isfile(path))
    return sorted(found, key=lambda name: PurePosixPath(name).parts)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return _existing(path)[0] if is_remote(path) else os.path.getsize(path)


def version(path: str) -> str:
    """The version of the file at a URI, for `read_range`. Raises FileNotFoundError."""
    return _existing(path)[1]


def open_binary(path: str) -> BinaryIO:
    """The file, opened for reading. Of a URI, the ranges that are read are fetched. Raises FileNotFoundError."""
    if is_remote(path):
        return io.BufferedReader(RangeFile(size(path), functools.partial(_read_block, path)))
    return open(path, "rb")


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each (start, bytes) of a URI's file, in pieces, with many requests at once."""
    remote, seen = remote_files(path), version(path)
    return in_order(functools.partial(remote.read_range, "", version=seen), pieces(_merged(ranges), _BLOCK_BYTES))


def in_order(read: Any, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """`read(start=, length=)` of each range, in their order, `RANGES_AT_ONCE` at a time."""
    pending = iter(ranges)
    with ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="ranges") as threads:
        waiting: list[Future[bytes]] = []
        try:
            while True:
                for start, length in itertools.islice(pending, RANGES_AT_ONCE - len(waiting)):
                    waiting.append(threads.submit(read, start=start, length=length))
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def pieces(ranges: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """`ranges` of (start, bytes), cut into pieces of at most `most` bytes."""
    for start, length in ranges:
        for at in range(start, start + length, most):
            yield at, min(most, start + length - at)


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """`ranges` in which those that follow on each other are one."""
    first = end = 0
    for start, length in ranges:
        if start != end and end > first:
            yield first, end - first
        if start != end:
            first = start
        end = start + length
    if end > first:
        yield first, end - first


@functools.lru_cache(maxsize=64)
def remote_files(uri: str) -> RemoteFiles:
    """What reads the files below a URI. Raises ValueError for one that cannot be opened."""
    # Arrow and numpy, which paths on this machine do not need, take a tenth of a second.
    from ltx_ray.storage.hub import SCHEME, HubFiles
    from ltx_ray.storage.retry import RetryPolicy
    from ltx_ray.storage.store import RETRY_SECONDS, Store

    if uri.startswith(SCHEME):
        return HubFiles(uri, RetryPolicy(uri, RETRY_SECONDS), _commits)
    return Store(uri).objects


def shown(path: str) -> str:
    """`path` as messages have it."""
    return recorded(path) if is_remote(path) else path


def identity(path: str) -> list[Any]:
    """What stays the same for as long as the file at `path` does."""
    if is_remote(path):
        found, seen = _existing(path)
        return [split_options(without_credentials(path))[0], found, seen]
    stat = os.stat(path)
    # A program can set the mtime, and copies keep it, but the ctime is the system's.
    return [os.path.realpath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


@functools.lru_cache(maxsize=4096)
def _head(uri: str) -> tuple[int, str] | None:
    try:
        return remote_files(uri).head("")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{shown(uri)}: cannot be read ({error})") from None


@functools.lru_cache(maxsize=256)
def _below(uri: str) -> dict[str, tuple[int, str]]:
    """(bytes, version) of each file below a URI, by its path from there."""
    try:
        found = remote_files(uri).listed("")
        return {name: (size, seen) for name, size, seen in found if name and size}
    except FileNotFoundError:
        return {}  # no such bucket
    except OSError as error:
        raise ValueError(f"{shown(uri)}: cannot be listed ({error})") from None


def _existing(uri: str) -> tuple[int, str]:
    found = _head(uri)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", shown(uri))
    return found


@functools.lru_cache(maxsize=_BLOCKS)
def _block(uri: str, number: int) -> bytes:
    total, seen = _existing(uri)
    start = number * _BLOCK_BYTES
    return remote_files(uri).read_range("", start, min(_BLOCK_BYTES, total - start), seen)


def _read_block(uri: str, start: int, count: int) -> bytes:
    """What the block in which a URI's file goes on has of `count` bytes."""
    number, within = divmod(start, _BLOCK_BYTES)
    return _block(uri, number)[within : within + count]
