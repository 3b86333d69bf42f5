"""Files below one root, on a local disk or in an object store: whole files or none, with retries."""

from __future__ import annotations

import io
import os
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from ltx_ray.storage.credentials import encoded_user_info, split_user_info
from ltx_ray.storage.local_files import (
    LocalFiles,
    make_folder,
    sync_folder,
    temporary_beside,
    write_synced,
)
from ltx_ray.storage.locations import recorded, resolve, split_options
from ltx_ray.storage.object_access import checksum_reader, connector, object_store_options
from ltx_ray.storage.object_client import ObjectClient
from ltx_ray.storage.parquet import read_parquet, read_parquet_file
from ltx_ray.storage.reasons import TEMPORARY, reason
from ltx_ray.storage.retry import RetryPolicy, retrying_reader

#: Seconds for which an operation is retried. A restarted or throttled store is back sooner.
RETRY_SECONDS = 60.0
#: Folder for files that are being written, on the disk on which they will be published.
SCRATCH = "_tmp"
#: Seconds after which a connection that does not open, or on which nothing arrives, is closed.
_CONNECT_SECONDS, _SILENCE_SECONDS = 10.0, 20.0
#: Tries of one request inside pyarrow, which repeats one part of a large upload where a `RetryPolicy` repeats all of
#: it. pyarrow's default is 31 tries every 200 ms, which makes throttling worse.
_REQUEST_TRIES = 3
_CHECK_RETRY_SECONDS = 10.0
#: Bytes below which an object is uploaded in one request. It is less than one part of a multi-part upload in every
#: version of pyarrow.
_SMALL = 4 * 2**20
#: What tells whether the store refuses to create an object a second time.
_PROBE = "state/probe"


class Store:
    """A root folder on a local disk or in an object store; paths are relative to it, with '/'.

    Readers never see a half-written file: local files are synced and renamed into place, and object stores show an
    object only when its upload is complete. Credentials, region and endpoint of an object store come from the
    environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL ...), or from pyarrow's options after a '?' in the URI
    (`s3://bucket/path?region=eu-west-1`), or stand before the bucket (`s3://KEY:SECRET@bucket/path`). Names of objects
    in a URI are not percent-encoded. `uri` is resolved; `name` is what messages and records call the store.

    Errors that may pass (throttling, 500s, cut connections, silence, a full disk) are retried for `retry_seconds`, and
    then raised as an OSError that says so. Errors for a missing or forbidden file are raised at once. Reads through
    `fs` are retried in the same way. `clock` and `wait`: see RetryPolicy.
    """

    def __init__(
        self,
        uri: str,
        retry_seconds: float = RETRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.uri = resolve(uri)
        self.name = recorded(self.uri)
        self._retry = RetryPolicy(split_options(self.name)[0], retry_seconds, clock, wait)
        if "://" in self.uri:
            plain = _pyarrow_uri(self.uri, retry_seconds)
            try:
                self._fs, self.root = self._retry("opening", "", lambda: pafs.FileSystem.from_uri(plain))
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self.name}: cannot be opened ({error})") from None
        else:
            self._fs, self.root = pafs.LocalFileSystem(), self.uri
        self._small = self._fs
        if isinstance(self._fs, pafs.S3FileSystem):
            self._small, self._fs = (_tuned(self._fs, retry_seconds, delayed) for delayed in (True, False))
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)
        self.fs = self._fs if self.is_local else retrying_reader(self._fs, self._retry)

    def retrying_for(self, seconds: float) -> Store:
        """The same store with other `retry_seconds`."""
        return Store(self.uri, seconds, self._retry.clock, self._retry.wait)

    def path(self, relative: str = "") -> str:
        """Full path of `relative` within the filesystem."""
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    def check_writable(self, what: str = "--output") -> None:
        """Raise ValueError naming the URI, given as `what`, unless a file can be made and removed under it."""
        probe = f"_probe-{secrets.token_hex(4)}"
        try:
            store = self.retrying_for(min(self._retry.seconds, _CHECK_RETRY_SECONDS))
            store.write_bytes(probe, probe.encode())  # a full disk takes an empty file
            if not store.is_local:
                store.create(probe, b"")  # by the other library, which has to find its credentials, too
            store.delete(probe)
        except Exception as error:  # each filesystem raises its own classes
            raise ValueError(
                f"{what}: {self.name}, cannot be written ({reason(error, place=False)}); legal: a place in which this "
                f"user, or these credentials, may make and delete files"
            ) from None

    def exists(self, relative: str) -> bool:
        return self._info(relative).type != pafs.FileType.NotFound

    def size(self, relative: str) -> int | None:
        """Bytes of a file; None when there is none."""
        info = self._info(relative)
        return info.size if info.type == pafs.FileType.File else None

    def modified(self, relative: str) -> float:
        """When a file was written, in seconds since 1970 by the clock of whoever keeps it."""
        info = self._info(relative)
        if info.mtime is None:
            raise FileNotFoundError(f"{self.name}: no {relative}")
        return float(info.mtime.timestamp())

    def _info(self, relative: str) -> pafs.FileInfo:
        return self._retry("looking up", relative, lambda: self._fs.get_file_info(self.path(relative)))

    def list_names(self, folder: str, recursive: bool = False) -> list[str]:
        """Base names of the files in `folder`, sorted; empty when there is no such folder."""
        infos = self._listed(folder, recursive)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in `folder`, sorted."""
        infos = self._listed(folder)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file in `folder`, by base name."""
        return {info.base_name: info.size for info in self._listed(folder) if info.type == pafs.FileType.File}

    def _listed(self, folder: str, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        return self._retry("listing", folder, lambda: self._fs.get_file_info(selector))

    def read_bytes(self, relative: str) -> bytes:
        """The whole file. Raises FileNotFoundError when there is none."""

        def read() -> bytes:
            with self._fs.open_input_file(self.path(relative)) as file:
                return file.read()

        return self._retry("reading", relative, read)

    def read_columns(self, relative: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a Parquet file, of which nothing else is read.

        Raises FileNotFoundError, and pa.ArrowException for a damaged file and one that lacks a column.
        """

        def read() -> pa.Table:
            with self._fs.open_input_file(self.path(relative)) as file:
                return read_parquet_file(file, columns)

        try:
            return self._retry.once("reading", read)
        except FileNotFoundError:
            raise
        except OSError:
            # The store's error, which is retried, or that of a damaged file.
            return read_parquet(self.read_bytes(relative), columns)

    def stored_checksums(self, relative: str) -> Mapping[str, str]:
        """The checksums (hex) that the store keeps of a whole file, by name (checksums.py), without reading it.

        S3 computes them while a file is written, and compares one with the sender's. Raises FileNotFoundError.
        """
        if isinstance(self._conditional, LocalFiles):
            return {}
        read, key = self._checksum_reader, self._conditional.key(relative)
        return self._retry("looking up", relative, lambda: read(key))

    @cached_property
    def _checksum_reader(self) -> Callable[[str], dict[str, str]]:
        return checksum_reader(self._fs, self.root, _SILENCE_SECONDS)

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a whole file. It replaces an older one atomically."""
        target = self.path(relative)

        def write() -> None:
            if not self.is_local:
                return self._put(target, data)
            temporary = temporary_beside(target)
            try:
                write_synced(temporary, data, target)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

        self._retry("writing", relative, write)

    def publish_file(self, relative: str, path: Path) -> None:
        """Write a whole file from one in `scratch_dir`, which is gone afterwards. It replaces an older one."""
        target = self.path(relative)

        def publish() -> None:
            make_folder(Path(target).parent)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
            sync_folder(os.path.dirname(target))

        if isinstance(self._conditional, LocalFiles):
            self._retry("writing", relative, publish)
        else:
            self._conditional.upload(relative, path)
            path.unlink()

    def signed_urls(self, relatives: Sequence[str], seconds: float) -> list[str]:
        """URLs of objects that need no credentials until they expire. Raises OSError when they cannot be signed."""
        return self.objects.signed_urls(relatives, seconds)

    def object_store_options(self) -> dict[str, str]:
        """How libraries that are built on the object_store crate reach the store; nothing for a local disk."""
        return {} if self.is_local else object_store_options(self._fs)

    @property
    def objects(self) -> ObjectClient:
        """The objects of an object store, for ranges of them."""
        assert isinstance(self._conditional, ObjectClient)
        return self._conditional

    @cached_property
    def _conditional(self) -> LocalFiles | ObjectClient:
        if self.is_local:
            return LocalFiles(self.root, self._retry)
        connect, silence = (min(most, max(1.0, self._retry.seconds)) for most in (_CONNECT_SECONDS, _SILENCE_SECONDS))
        return ObjectClient(connector(self._fs, self.root, connect), self.root, silence, self._retry)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole file only if there is none; of several writers at once, one gets True.

        True means that the file has exactly these bytes, and from this call: when an answer was lost, what is there
        tells whose it is, so different writers should write different bytes. False means that another is there. An
        object store without conditions is not that strict; see `refuses_second_create`.
        """
        return self._conditional.create(relative, data)

    def read_versioned(self, relative: str) -> tuple[bytes, str]:
        """The whole file, and the version of it for `update`. Raises FileNotFoundError when there is none."""
        return self._conditional.read_versioned(relative)

    def update(self, relative: str, data: bytes, version: str) -> bool:
        """Replace a whole file that is still in this version; False when it is in another, or not there.

        A lost answer is settled as in `create`. On a network file system without locks, and in an object store without
        conditions, two writers at once may both get True.
        """
        return self._conditional.update(relative, data, version)

    def names(self, folder: str) -> Iterator[str]:
        """Names of all files below `folder`, relative to it, in no order; memory does not grow with their number.

        Files that are being written are left out. Nothing is raised when there is no such folder.
        """
        return self._conditional.names(folder)

    def delete_many(self, relatives: Iterable[str]) -> None:
        """Remove files, as many in one request as the store takes. Those that are not there are passed over."""
        self._conditional.delete_many(relatives)

    def refuses_second_create(self, probe: str = _PROBE) -> bool:
        """Whether the store itself keeps `create` from replacing a file. Not every S3-compatible store does.

        This leaves a file at `probe`.
        """
        files = self._conditional
        create = files.create if isinstance(files, LocalFiles) else files.create_on_condition
        try:
            return not all(create(probe, secrets.token_bytes(16)) for _ in range(2))
        except io.UnsupportedOperation:
            return False

    def _put(self, target: str, data: bytes) -> None:
        # In one call: a stream that is closed after half of the data uploads that half as the object. For the same
        # reason a multi-part upload begins before anything is written: if the first write had to begin it and could
        # not, an empty object would replace the older one.
        fs = self._small if len(data) < _SMALL else self._fs
        with fs.open_output_stream(target, compression=None) as file:  # by default a name ending in .zst is compressed
            file.write(data)

    def append_text(self, relative: str, text: str) -> None:
        """Append to a local file. In an object store the caller has to rewrite the whole object."""
        assert self.is_local
        path = Path(self.path(relative))

        def append() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                data = memoryview(text.encode("utf-8", "replace"))
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(size)  # a full disk may have taken a part
                    raise

        self._retry("writing", relative, append)

    def move(self, relative: str, to: str) -> None:
        """Rename a file, replacing an older `to`. Objects are copied, then deleted: for a moment both exist."""
        source, target = self.path(relative), self.path(to)

        def move() -> None:
            self._fs.move(source, target)

        try:
            self._retry("renaming", relative, move)
        except FileNotFoundError:
            if not self.exists(to):  # the response of an earlier try may have been lost
                raise

    def delete(self, relative: str) -> None:
        """Remove a file, if there is one."""
        try:
            self._retry("deleting", relative, lambda: self._fs.delete_file(self.path(relative)))
        except FileNotFoundError:
            pass

    def scratch_dir(self) -> str | None:
        """A folder on the output's disk for temporary files. None, for an object store, means the system's default."""
        if not self.is_local:
            return None
        folder = Path(self.root) / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def remove_scratch(self) -> None:
        """Remove the folder of `scratch_dir` if it is empty."""
        self.remove_empty_folder(SCRATCH)  # it may hold another run's file

    def remove_empty_folder(self, relative: str) -> None:
        """Remove a folder on a local disk if it is empty. An object store has none."""
        if self.is_local:
            try:
                os.rmdir(self.path(relative))
            except OSError:
                pass


def clean_stale(store: Store, older_than_seconds: float, seconds: float = 5.0) -> int:
    """Remove temporary files that killed processes left in a local output; returns how many.

    A file written to within the last `older_than_seconds` may belong to a running process and stays. Object stores
    have no temporary files. Folders of many files are looked through in a random order, for so many `seconds` in all:
    what is left may be found the next time.
    """
    if not store.is_local:
        return 0
    latest, removed, end = time.time() - older_than_seconds, 0, time.monotonic() + seconds
    for path in _temporaries(store.root, end):
        try:
            if os.stat(path).st_mtime <= latest:
                os.unlink(path)
                removed += 1
        except OSError:
            pass  # its owner has published or removed it
    return removed


def _temporaries(root: str, end: float) -> Iterator[str]:
    folders = [root]
    while folders and time.monotonic() < end:
        folder = folders.pop(random.randrange(len(folders)))
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        if TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                            yield entry.path
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif folder == f"{root}/{SCRATCH}":
                        yield entry.path
        except OSError:
            continue


def _pyarrow_uri(uri: str, retry_seconds: float) -> str:
    """The URI of an object store as pyarrow reads it: percent-encoded, and with bounds for its own retries."""
    place, options = split_options(uri)
    scheme, _, rest = place.partition("://")
    info, rest = split_user_info(rest)
    host, slash, key = rest.partition("/")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:
        # By default, pyarrow itself retries gs:// for a quarter of an hour.
        limit = max(1.0, min(retry_seconds, _SILENCE_SECONDS))
        options += f"{'&' if options else '?'}retry_limit_seconds={limit}"
    return f"{scheme}://{encoded_user_info(info)}{host}{slash}{quote(key)}{options}"


def _tuned(fs: pafs.S3FileSystem, retry_seconds: float, delayed: bool) -> pafs.S3FileSystem:
    """`fs` with timeouts and few retries of its own. With `delayed`, a small object takes one request and not three."""
    _, (options,) = fs.__reduce__()
    changes = {
        "connect_timeout": min(_CONNECT_SECONDS, max(1.0, retry_seconds)),
        "request_timeout": min(_SILENCE_SECONDS, max(1.0, retry_seconds)),
        "allow_delayed_open": delayed,
    }
    # Older versions of pyarrow have fewer options.
    changes = {name: value for name, value in changes.items() if name in options}
    return pafs.S3FileSystem(
        **{**options, **changes}, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_TRIES)
    )
