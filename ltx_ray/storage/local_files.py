"""Files on a local disk that are created only once, or replaced only in the version that was read."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ltx_ray.storage.reasons import TEMPORARY
from ltx_ray.storage.retry import RetryPolicy

#: What link(2) answers on a disk without hard links, such as exFAT and some that are mounted with FUSE.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
#: What flock(2) answers on a network file system that was mounted without locks.
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}


class LocalFiles:
    """Files below `root`, whose paths are relative to it. `Store` documents the methods.

    A file that was created or updated, and its name, are on the disk when the call returns: what it replaces may be
    deleted then.
    """

    def __init__(self, root: str, retry: RetryPolicy):
        self._root, self._retry = root, retry

    def create(self, relative: str, data: bytes) -> bool:
        target = self._path(relative)
        temporary = self._retry("creating", relative, lambda: temporary_beside(target))
        try:
            self._retry("creating", relative, lambda: write_synced(temporary, data, target))
            return self._retry("creating", relative, lambda: _name(temporary, target))
        finally:
            temporary.unlink(missing_ok=True)

    def read_versioned(self, relative: str) -> tuple[bytes, str]:
        data = self._retry("reading", relative, Path(self._path(relative)).read_bytes)
        return data, _version(data)

    def update(self, relative: str, data: bytes, version: str) -> bool:
        target = self._path(relative)
        if not self._retry("looking up", relative, lambda: os.path.exists(target)):
            return False
        temporary = self._retry("writing", relative, lambda: temporary_beside(target))
        try:
            written = self._retry("writing", relative, lambda: write_synced(temporary, data, target))
            return self._retry("writing", relative, lambda: _replace(temporary, written, target, version))
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, folder: str) -> Iterator[str]:
        pending = [""]
        while pending:
            inner = pending.pop()
            below = f"{folder}/{inner}".strip("/")
            try:
                entries = self._retry("listing", below, functools.partial(os.scandir, self._path(below)))
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{inner}{entry.name}/")
                    elif not TEMPORARY.fullmatch(entry.name):
                        yield inner + entry.name

    def delete_many(self, relatives: Iterable[str]) -> None:
        for relative in relatives:
            try:
                self._retry("deleting", relative, functools.partial(os.unlink, self._path(relative)))
            except FileNotFoundError:
                pass

    def _path(self, relative: str) -> str:
        return f"{self._root.rstrip('/')}/{relative}" if relative else self._root


def _name(temporary: Path, target: str) -> bool:
    """Give the file its name; False when another file has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # An earlier try may have had an error after it was carried out, and NFS answers this when the response to its
        # first request was lost.
        if not os.path.samefile(temporary, target):
            return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _locked(target):
            if os.path.lexists(target):
                return not temporary.exists()  # an earlier try may have moved it
            os.rename(temporary, target)
    sync_folder(os.path.dirname(target))
    return True


def _replace(temporary: Path, written: os.stat_result, target: str, version: str) -> bool:
    """Move the file over `target` if that has `version`. `written`: the file as it was written."""
    with _locked(target):
        try:
            if not temporary.exists():  # an earlier try had an error after the move
                now = os.stat(target)
                return os.path.samestat(now, written) and now.st_mtime_ns == written.st_mtime_ns
            if _version(Path(target).read_bytes()) != version:
                return False
        except FileNotFoundError:
            return False
        os.replace(temporary, target)
        sync_folder(os.path.dirname(target))
    return True


def temporary_beside(target: str) -> Path:
    """The path of a new file in the folder of `target`, which is made where there is none."""
    path = Path(target)
    make_folder(path.parent)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def sync_folder(folder: str | Path) -> None:
    """Flush the names in `folder` to the disk."""
    handle = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders cannot be flushed
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, each with its name on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_synced(path: Path, data: bytes, target: str) -> os.stat_result:
    """Write a file and flush it to the disk, so that a power cut cannot leave the name it is given with no data.

    target: the file that it is to become, which errors name.
    """
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno())
    except OSError as error:
        error.filename = target
        raise


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _locked(target: str) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it that is deleted with the lock.

    On a file system without locks the block is not exclusive.
    """
    path = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if _is_at(handle, path):
                try:
                    yield
                finally:
                    if _is_at(handle, path):
                        os.unlink(path)
                return
        finally:
            os.close(handle)
        # The one who held it before has deleted it.


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    os.utime(handle)  # so that it is not taken for one that a killed process left


def _is_at(handle: int, path: str) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
