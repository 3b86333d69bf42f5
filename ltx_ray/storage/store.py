"""One small wrapper over pyarrow.fs: put-then-publish, list, exists; local paths, s3:// and gs://."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from ltx_ray.storage.retry import RetryPolicy, patient_reader

#: Seconds for which an operation is tried; a restarted or throttled store is back sooner.
PATIENCE = 60.0
#: Where files grow that will be published, on the disk they will be published on.
SCRATCH = "_tmp"
#: Seconds after which a connection that does not open, or over which nothing comes, is given up.
_CONNECT_SECONDS, _SILENCE_SECONDS = 10.0, 20.0
#: Tries of one request inside pyarrow, which repeats one part of a large upload where we repeat all of it.
#: Its own default would be 31 tries every 200 ms, which a store that throttles is the worse for.
_REQUEST_TRIES = 3
_CHECK_PATIENCE = 10.0
#: Bytes below which an object goes up in one request; less than a part of any pyarrow's uploads.
_SMALL = 4 * 2**20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


#: What pyarrow opens by URI and we have tried or have a reason to trust.
_SCHEMES = ("s3", "gs", "gcs", "file")


class Store:
    """A root folder on a local disk or in an object store; paths are relative to it, with '/'.

    Nothing is ever seen half-written: local files are synced and renamed into place, object stores show an
    object only when its upload is complete. Credentials, region and endpoint of an object store come from
    the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL ...), or from options behind a '?' in
    the URI as pyarrow has them (`s3://bucket/path?region=eu-west-1`). Keys stand in a URI as they are, not
    percent-encoded.

    Whatever may pass (throttling, 500s, cut connections, silence, a full disk) is tried again for `patience`
    seconds and then an OSError that says so; what is missing or forbidden is raised at once. `fs` has the same
    patience for those who read through it. clock, wait: see Patience.
    """

    def __init__(
        self,
        uri: str,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.uri = uri.rstrip("/") if len(uri) > 1 else uri
        self._patiently = RetryPolicy(split_options(self.uri)[0], patience, clock, wait)
        if "://" in uri:
            place, options = split_options(uri)
            scheme, _, rest = place.rstrip("/").partition("://")
            host, slash, key = rest.partition("/")
            if scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:
                # its own loop, which would go on for a quarter of an hour
                options += f"{'&' if options else '?'}retry_limit_seconds={max(1.0, min(patience, _SILENCE_SECONDS))}"
            plain = f"{scheme}://{host}{slash}{quote(key)}{options}"
            if scheme not in _SCHEMES:
                raise ValueError(f"{uri}: no place that can be read or written; legal: a folder, s3:// or gs://")
            self._fs, self.root = self._patiently("opening", "", lambda: pafs.FileSystem.from_uri(plain))
        else:
            self._fs, self.root = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
        self._small = self._fs
        if isinstance(self._fs, pafs.S3FileSystem):
            self._small, self._fs = (_tuned(self._fs, patience, delayed) for delayed in (True, False))
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)
        self.fs = self._fs if self.is_local else patient_reader(self._fs, self._patiently)

    def hurried(self, patience: float) -> Store:
        """The same store with another patience, for what can wait or must not hold anything up."""
        return Store(self.uri, patience, self._patiently.clock, self._patiently.wait)

    def path(self, relative: str = "") -> str:
        """Full path of `relative` within the filesystem."""
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    def check_writable(self) -> None:
        """Raise ValueError naming the URI unless a file can be made and removed under it."""
        probe = f"_probe-{secrets.token_hex(4)}"
        try:
            store = self.hurried(min(self._patiently.seconds, _CHECK_PATIENCE))
            store.write_bytes(probe, b"")
            store.delete(probe)
        except Exception as error:  # every filesystem raises its own kinds
            raise ValueError(f"--output: {self.uri}, cannot be written ({error})") from None

    def exists(self, relative: str) -> bool:
        return self._info(relative).type != pafs.FileType.NotFound

    def size(self, relative: str) -> int | None:
        """Bytes of a file; None when there is none."""
        info = self._info(relative)
        return info.size if info.type == pafs.FileType.File else None

    def _info(self, relative: str) -> pafs.FileInfo:
        return self._patiently("looking up", relative, lambda: self._fs.get_file_info(self.path(relative)))

    def list(self, folder: str, recursive: bool = False) -> list[str]:
        """Names (without folders) of the files in `folder`, sorted; empty when there is no such folder."""
        infos = self._listed(folder, recursive)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in `folder`, sorted."""
        infos = self._listed(folder)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files in `folder`, by name."""
        return {info.base_name: info.size for info in self._listed(folder) if info.type == pafs.FileType.File}

    def _listed(self, folder: str, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        return self._patiently("listing", folder, lambda: self._fs.get_file_info(selector))

    def read_bytes(self, relative: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""

        def read() -> bytes:
            with self._fs.open_input_file(self.path(relative)) as file:
                return file.read()

        return self._patiently("reading", relative, read)

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a whole file, replacing an older one at once."""
        target = self.path(relative)

        def write() -> None:
            if not self.is_local:
                return self._put(target, data)
            temporary = _temporary_beside(target)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    _sync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

        self._patiently("writing", relative, write)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole local file unless there is one already: of several that try at once, one is told True.

        Raises OSError on a disk without hard links.
        """
        assert self.is_local
        target = self.path(relative)
        temporary = _temporary_beside(target)
        try:
            temporary.write_bytes(data)
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _put(self, target: str, data: bytes) -> None:
        # in one call: a stream that is given half of it and then let go uploads the half as the object. For the same
        # reason an upload of several parts is begun before anything is written: one that could not be begun by a
        # write would leave an empty object in the place of an older one
        with (self._small if len(data) < _SMALL else self._fs).open_output_stream(target) as file:
            file.write(data)

    def append_text(self, relative: str, text: str) -> None:
        """Append to a local file. Object stores cannot: the caller rewrites the whole there."""
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
                    file.truncate(size)  # a disk that is full took a part of it
                    raise

        self._patiently("writing", relative, append)

    def publish(self, local_file: str, relative: str) -> None:
        """Move the finished `local_file` to `relative`."""
        target = self.path(relative)
        if not self.is_local:
            data = Path(local_file).read_bytes()
            self._patiently("writing", relative, lambda: self._put(target, data))
            os.unlink(local_file)
            return
        temporary = self._patiently("writing", relative, lambda: _temporary_beside(target))

        def write() -> None:
            if os.path.exists(local_file):  # else it was moved by the try before
                shutil.move(local_file, temporary)
            with open(temporary, "rb") as file:
                _sync(file.fileno())
            os.replace(temporary, target)

        try:
            self._patiently("writing", relative, write)
        finally:
            temporary.unlink(missing_ok=True)

    def move(self, relative: str, to: str) -> None:
        """Rename a file, replacing an older `to`. An object is copied and deleted: both may be seen for a moment."""
        source, target = self.path(relative), self.path(to)

        def move() -> None:
            self._fs.move(source, target)

        try:
            self._patiently("renaming", relative, move)
        except FileNotFoundError:
            if not self.exists(to):  # the answer of an earlier try was lost
                raise

    def delete(self, relative: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        try:
            self._patiently("deleting", relative, lambda: self._fs.delete_file(self.path(relative)))
        except FileNotFoundError:
            pass

    def scratch_dir(self) -> str | None:
        """A folder on the same local disk for files that will be published, or None for the default."""
        if not self.is_local:
            return None
        folder = Path(self.root) / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def remove_scratch(self) -> None:
        """Remove the folder of `scratch_dir` when nothing is in it."""
        if self.is_local:
            try:
                os.rmdir(self.path(SCRATCH))
            except OSError:
                pass  # another run's file, or no such folder


def clean_stale(store: Store, older_than_seconds: float) -> int:
    """Remove temporaries that killed processes left in a local output; returns how many.

    Only those that nobody wrote to for `older_than_seconds`: others may be at work. An object store has none.
    """
    if not store.is_local:
        return 0
    latest, removed = time.time() - older_than_seconds, 0
    for path in _temporaries(store.root):
        try:
            if os.stat(path).st_mtime <= latest:
                os.unlink(path)
                removed += 1
        except OSError:
            pass  # its owner was faster
    return removed


def _temporaries(root: str) -> Iterator[str]:
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                            yield entry.path
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif folder == f"{root}/{SCRATCH}":
                        yield entry.path
        except OSError:
            continue


def _tuned(fs: pafs.S3FileSystem, patience: float, delayed: bool) -> pafs.S3FileSystem:
    """The same with timeouts and few tries of its own. delayed: a small object takes one request, not three."""
    _, (options,) = fs.__reduce__()
    changes = {
        "connect_timeout": min(_CONNECT_SECONDS, max(1.0, patience)),
        "request_timeout": min(_SILENCE_SECONDS, max(1.0, patience)),
        "allow_delayed_open": delayed,
    }
    changes = {name: value for name, value in changes.items() if name in options}  # older pyarrows have fewer
    return pafs.S3FileSystem(
        **{**options, **changes}, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_TRIES)
    )


def _sync(handle: int) -> None:
    """On to the disk, before a rename: a power cut must not leave the new name with nothing in it.

    The rename itself is left to the file system's journal, which keeps a clip's before that of its index row.
    """
    os.fsync(handle)


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these with their '?'; a local path has none."""
    if "://" not in uri:
        return uri, ""
    place, mark, options = uri.partition("?")
    return place, mark + options


def join(folder: str, name: str) -> str:
    """Path or URI of `name` below `folder`, with the folder's options."""
    place, options = split_options(folder)
    return f"{place.rstrip('/')}/{name}{options}" if "://" in folder else os.path.join(folder, name)


def parent(uri: str) -> str:
    """Path or URI of the folder that holds `uri`, with its options."""
    place, options = split_options(uri)
    return os.path.dirname(place) + options


def _temporary_beside(target: str) -> Path:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
