"""Files of a repository on the Hugging Face Hub, in one commit: hf://org/repo@revision/path. Needs huggingface_hub.

It finds its own token and mirror (HF_TOKEN, HF_ENDPOINT, or what `hf auth login` has stored).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

from ltx_ray.storage.object_client import FileReplaced, whole
from ltx_ray.storage.retry import RetryPolicy

T = TypeVar("T")

SCHEME = "hf://"
_URI = re.compile(
    r"hf://(?P<repo>[^/@\s?#]+/[^/@\s?#]+)(?:@(?P<revision>[^/\s?#]+))?(?:/(?P<path>(?:[^/?#]+/)*[^/?#]+))?"
)


def hub_location(uri: str) -> str:
    """`uri` without slashes at its end. Raises ValueError when it is none, or the package for it is missing."""
    found = _URI.fullmatch(uri.rstrip("/"))
    if found is None:
        raise ValueError(f"{uri}, names no file of the Hub; legal: hf://org/repo@revision/file")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{uri}, needs the package huggingface_hub; legal: pip install huggingface_hub, or another place"
        )
    return found.group()


class HubFiles:
    """The files below an hf:// location, as ObjectClient has those of a bucket."""

    def __init__(self, uri: str, retry: RetryPolicy):
        found = _URI.fullmatch(uri)
        assert found is not None, uri
        self._uri, self._retry = uri, retry
        self._repo, self._folder = found["repo"], (found["path"] or "").strip("/")
        # A branch's name with slashes has them percent-encoded, as in refs%2Fpr%2F1.
        self._revision = unquote(found["revision"]) if found["revision"] else None

    def listed(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """(name relative to `folder`, bytes, version) of all files below it; nothing where there is no such folder."""
        below = f"{self._folder}/{folder}".strip("/")

        def find() -> dict[str, dict[str, Any]]:
            return self._system.find(self._path(below, self._commit), detail=True)

        try:
            entries = self._try("listing", folder, find)
        except FileNotFoundError:
            return
        start = len(self._path(below, self._commit)) + 1
        for name, entry in entries.items():
            if entry["type"] == "file" and len(name) > start:
                yield name[start:], entry["size"], self._version(entry)

    def head(self, relative: str) -> tuple[int, str]:
        """Bytes and version of a file. Raises FileNotFoundError when there is none."""
        path = self._path(f"{self._folder}/{relative}".strip("/"), self._commit)
        entry = self._try("looking up", relative, lambda: self._system.info(path))
        if entry["type"] != "file":
            raise FileNotFoundError(f"{self._uri}: {relative} is a folder")
        return entry["size"], self._version(entry)

    def read_range(self, relative: str, start: int, length: int, version: str) -> bytes:
        """`length` bytes of a file in the commit that `version` names, from byte `start` on."""
        path = self._path(f"{self._folder}/{relative}".strip("/"), json.loads(version)["commit"])

        def read() -> bytes:
            with self._system.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                return whole(file.read(length), length)

        try:
            return self._try("reading", relative, read)
        except FileNotFoundError:
            raise FileReplaced(f"{self._uri}: {relative} is gone from its repository") from None

    @staticmethod
    def sha256(version: str) -> str | None:
        """The SHA-256 (hex) that the Hub keeps of a file; None for a small one, of which it keeps git's own digest."""
        found: str | None = json.loads(version).get("sha256")
        return found

    def _version(self, entry: dict[str, Any]) -> str:
        lfs = entry.get("lfs")
        sha256 = lfs["sha256"] if lfs else None
        return json.dumps({"commit": self._commit, "sha256": sha256, "blob": entry.get("blob_id")})

    def _path(self, path: str, commit: str) -> str:
        return f"{self._repo}@{commit}/{path}".rstrip("/")

    @functools.cached_property
    def _commit(self) -> str:
        from huggingface_hub import HfApi

        info = self._try("looking up", "", lambda: HfApi().repo_info(self._repo, revision=self._revision))
        return str(info.sha)

    @functools.cached_property
    def _system(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem()

    def _try(self, doing: str, relative: str, call: Callable[[], T]) -> T:
        """`call()`, whose errors are those by which RetryPolicy knows what may pass."""

        def attempt() -> T:
            from huggingface_hub.errors import (
                EntryNotFoundError,
                HfHubHTTPError,
                RepositoryNotFoundError,
                RevisionNotFoundError,
            )

            try:
                return call()
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError) as error:
                raise FileNotFoundError(_first_line(error)) from None
            except HfHubHTTPError as error:
                status = getattr(error.response, "status_code", None)
                kind = PermissionError if status in (401, 403) else OSError
                raise kind(f"{_first_line(error)} (HTTP status {status})") from None

        return self._retry(doing, relative, attempt)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
