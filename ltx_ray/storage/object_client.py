"""Objects of a bucket that are created only once, or replaced only in the version that was read."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx_ray.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

#: Objects that S3 deletes in one request.
_BATCH = 1000
#: Bytes for which a writer waits as long as for a silent store: 0.8 MB/s in 20 seconds.
_UPLOAD_BYTES = 16 * 2**20
#: Parts of a large file that are uploaded at once, 5 MiB each.
_PARTS_AT_ONCE = 4
#: What a store answered, in a message of obstore's; a page of debugging output follows.
_STATUS = re.compile(r"non-2xx status code: (\d+)")
_CODE = re.compile(r"<Code>(.*?)</Code>")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_REQUEST = re.compile(r".*?(?:Generic \w+ error: |in [\d.]+[nµm]?s - )", re.DOTALL)
#: Answers with status 400 that a later try does not get.
_PASSING_CODES = {"RequestTimeout", "ExpiredToken", "RequestTimeTooSkewed"}


class ObjectClient:
    """Objects below `root` ("bucket/folder"), whose paths are relative to it. `Store` documents the methods.

    `connect(seconds, checksums)` opens the bucket with a client for which a request is lost after so many seconds
    without an answer, and which has the store keep the SHA-256 of what it writes, if it can; `silence` are the seconds
    of a small request.
    """

    def __init__(self, connect: Callable[[float, bool], ObjectStore], root: str, silence: float, retry: RetryPolicy):
        _, _, self._prefix = root.partition("/")
        self._connect, self._silence, self._retry = functools.cache(connect), silence, retry
        #: Whether the store takes checksums. Not every S3-compatible one does.
        self._checksums = True

    def create(self, relative: str, data: bytes) -> bool:
        try:
            return self.create_on_condition(relative, data)
        except io.UnsupportedOperation:
            return self._replace("creating", relative, data, None)

    def create_on_condition(self, relative: str, data: bytes) -> bool:
        """`create` by the store's own condition. Raises io.UnsupportedOperation when it has none."""
        return self._put("creating", relative, data, "create")

    def read_versioned(self, relative: str) -> tuple[bytes, str]:
        return self._retry("reading", relative, lambda: self._get(relative))

    def update(self, relative: str, data: bytes, version: str) -> bool:
        try:
            return self._put("writing", relative, data, json.loads(version))
        except io.UnsupportedOperation:
            return self._replace("writing", relative, data, version)

    def names(self, folder: str) -> Iterator[str]:
        # An object without data stands for a folder, and obstore shows it without its slash.
        return (name for name, size, _ in self.listed(folder) if size)

    def listed(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """(name relative to `folder`, bytes, version) of all objects below it, in no order."""
        import obstore

        below = self.key(folder)
        start = len(below) + 1 if below else 0
        stream: Iterator[Any] | None = None
        last: str | None = None

        def page() -> Any:
            nonlocal stream
            with _os_errors():
                # After an error, the listing goes on behind the last name.
                stream = stream or iter(obstore.list(self._connect(self._silence, False), below or None, offset=last))
                try:
                    return next(stream, [])
                except Exception:
                    stream = None
                    raise

        while found := self._retry("listing", folder, page):
            last = found[-1]["path"]
            yield from ((meta["path"][start:], meta["size"], _version(meta)) for meta in found)

    def head(self, relative: str) -> tuple[int, str]:
        """Bytes and version of an object. Raises FileNotFoundError when there is none."""
        import obstore

        def head() -> tuple[int, str]:
            with _os_errors():
                meta = obstore.head(self._connect(self._silence, False), self.key(relative))
            return meta["size"], _version(meta)

        return self._retry("looking up", relative, head)

    def read_range(self, relative: str, start: int, length: int, version: str) -> bytes:
        """`length` bytes of an object in this version, from byte `start` on. Threads may share the client.

        Raises FileNotFoundError when the object is gone, and FileReplaced when it is there in another version.
        """
        import obstore

        options: GetOptions = {"range": (start, start + length)}
        if (tag := json.loads(version).get("e_tag")) is not None:
            options["if_match"] = tag

        def get() -> bytes:
            with _os_errors():
                answer = obstore.get(self._connect(self._silence, False), self.key(relative), options=options)
                return whole(bytes(answer.bytes()), length)

        try:
            return self._retry("reading", relative, get)
        except _Refused:
            raise FileReplaced(f"{self._retry.uri}: {relative} was replaced while it was read") from None

    def delete_many(self, relatives: Iterable[str]) -> None:
        pending = iter(relatives)
        while batch := list(itertools.islice(pending, _BATCH)):
            shown = batch[0] if len(batch) == 1 else f"{batch[0]} and {len(batch) - 1} more"
            self._retry("deleting", shown, functools.partial(self._delete, [self.key(name) for name in batch]))

    def _delete(self, keys: list[str]) -> None:
        import obstore

        try:
            with _os_errors():
                obstore.delete(self._connect(self._silence, False), keys)
        except FileNotFoundError:
            # Google's store, unlike S3, says that one is missing, and the others may be left.
            for key in keys if len(keys) > 1 else ():
                self._delete([key])

    def key(self, relative: str) -> str:
        """The object's name in its bucket."""
        return f"{self._prefix}/{relative}".strip("/")

    def _get(self, relative: str) -> tuple[bytes, str]:
        import obstore

        with _os_errors():
            answer = obstore.get(self._connect(self._silence, False), self.key(relative))
            return bytes(answer.bytes()), _version(answer.meta)

    def _put(self, doing: str, relative: str, data: bytes, mode: Any) -> bool:
        """Write the object; False when the condition of `mode` does not hold."""
        import obstore

        seconds = self._silence * (1 + len(data) // _UPLOAD_BYTES)
        unsure = False

        def put() -> bool:
            nonlocal unsure
            try:
                with _os_errors():
                    client = self._connect(seconds, self._checksums)
                    obstore.put(client, self.key(relative), data, mode=mode, use_multipart=False)
                return True
            except _Refused:
                # It may be this call's own object that was in the way.
                return unsure and self._holds(relative, data)
            except _Conflict:
                raise
            except OSError as error:
                if self._checksums and "checksum" in str(error).lower():
                    self._checksums = False
                    return put()
                unsure = True
                raise

        return self._retry(doing, relative, put)

    def upload(self, relative: str, path: Path) -> None:
        """Write an object from a file, in parts where it is large. It replaces an older one when it is complete."""
        import obstore

        def put() -> None:
            with _os_errors():
                client = self._connect(2 * self._silence, False)
                obstore.put(client, self.key(relative), path, max_concurrency=_PARTS_AT_ONCE)

        self._retry("writing", relative, put)

    def signed_urls(self, relatives: Sequence[str], seconds: float) -> list[str]:
        """URLs by which anybody reads these objects for so long. Raises OSError without credentials that can sign."""
        import obstore

        keys = [self.key(relative) for relative in relatives]
        with _os_errors():
            signed: list[str] = obstore.sign(  # type: ignore[call-overload]
                self._connect(self._silence, False), "GET", keys, timedelta(seconds=seconds)
            )
        return signed

    def _replace(self, doing: str, relative: str, data: bytes, version: str | None) -> bool:
        """For a store without conditions: look, then write. Of several writers at once, more than one may do so."""
        try:
            present = self.read_versioned(relative)[1]
        except FileNotFoundError:
            present = None
        return present == version and self._put(doing, relative, data, "overwrite")

    def _holds(self, relative: str, data: bytes) -> bool:
        try:
            return self._get(relative)[0] == data
        except FileNotFoundError:
            return False


def whole(data: bytes, length: int) -> bytes:
    """`data`, which are the `length` bytes that were asked for. Raises OSError when an answer was cut off."""
    if len(data) != length:
        raise OSError(f"{len(data)} bytes came where {length} were asked for")
    return data


class FileReplaced(ValueError):
    """The file is there, but no longer in the version that was asked for."""


def _version(meta: ObjectMeta) -> str:
    # S3 compares the first of them, Google's store the second.
    found = {"e_tag": meta["e_tag"], "version": meta["version"]}
    return json.dumps({name: value for name, value in found.items() if value is not None})


class _Refused(Exception):
    """The condition of a write does not hold."""


class _Conflict(OSError):
    """Another write of the object was under way. It decided nothing, so the write has to be tried again."""


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise obstore's errors as the OSErrors by which RetryPolicy knows what may pass, with the store's own words."""
    from obstore import exceptions

    try:
        yield
    except exceptions.BaseError as error:
        status, text = _described(str(error))
        if status == 409:
            raise _Conflict(text) from None
        if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
            raise _Refused(text) from None
        if isinstance(error, exceptions.NotSupportedError) or status == 501:
            raise io.UnsupportedOperation(f"the store has no conditional writes: {text}") from None
        if isinstance(error, exceptions.PermissionDeniedError) or status in (401, 403):
            raise PermissionError(text) from None
        raise OSError(text) from None
    except FileNotFoundError as error:  # obstore's NotFoundError
        raise FileNotFoundError(_described(str(error))[1]) from None


def _described(message: str) -> tuple[int | None, str]:
    """The HTTP status in an error of obstore's, where there is one, and the error in one line."""
    brief = message.partition("\n\nDebug source:")[0]
    found = _STATUS.search(brief)
    status = int(found.group(1)) if found else None
    code, told = _CODE.search(brief), _MESSAGE.search(brief)
    if code is None:
        text = _REQUEST.sub("", brief)
        cause = re.search(r"kind: (Timeout|Connect)\b", message)
        return status, f"{text} ({cause.group(1).lower()})" if cause else text
    text = f"{code.group(1)}: {told.group(1)}" if told else code.group(1)
    return status, text if code.group(1) in _PASSING_CODES else f"{text} (HTTP status {status})"
