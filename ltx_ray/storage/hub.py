"""Files of a repository on the Hugging Face Hub, in one commit: hf://org/repo@revision/path. Needs huggingface_hub.

It finds its own token and mirror (HF_TOKEN, HF_ENDPOINT, or what `hf auth login` has stored).
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from ltx_ray.storage.object_client import FileReplaced, whole
from ltx_ray.storage.retry import RetryPolicy

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

SCHEME = "hf://"
_URI = re.compile(
    r"hf://(?P<repo>[^/@\s?#]+/[^/@\s?#]+)(?:@(?P<revision>[^/\s?#]+))?(?:/(?P<path>(?:[^/?#]+/)*[^/?#]+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
#: Hex digits of a SHA-256, the ETag of a large file. That of a small one is git's own digest of 40.
_SHA256_DIGITS = 64
#: Bytes of a file that may come whole where a range of it is asked for, as small files of the Hub do.
_MOST_WHOLE = 32 * 2**20


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
    """The files below an hf:// location, as ObjectClient has those of a bucket.

    The Hub answers a request for a file with the address where its bytes are, and counts such requests: some thousands
    in five minutes. So the address is asked for once, and all ranges are read there until it is refused.
    """

    def __init__(self, uri: str, retry: RetryPolicy, commits: dict[tuple[str, str | None], str] | None = None):
        """`commits`: those of the repositories and revisions that have been asked for, for files of one commit."""
        found = _URI.fullmatch(uri)
        assert found is not None, uri
        self._uri, self._retry = uri, retry
        self._repo, self._folder = found["repo"], (found["path"] or "").strip("/")
        # A branch's name with slashes has them percent-encoded, as in refs%2Fpr%2F1.
        self._revision = unquote(found["revision"]) if found["revision"] else None
        self._commits = {} if commits is None else commits
        self._addresses: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def listed(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """(name relative to `folder`, bytes, version) of all files below it; nothing where there is no such folder."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        below, commit = self._path(folder), self._commit

        def find() -> list[RepoFile]:
            tree = HfApi().list_repo_tree(self._repo, below or None, recursive=True, revision=commit)
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        try:
            files = self._try("listing", folder, find)
        except FileNotFoundError:
            return
        start = len(below) + 1 if below else 0
        for file in files:
            yield file.path[start:], file.size, _version(commit, file.lfs["sha256"] if file.lfs else file.blob_id)

    def head(self, relative: str) -> tuple[int, str]:
        """Bytes and version of a file. Raises FileNotFoundError when there is none."""
        path = self._path(relative)
        if not path:
            raise FileNotFoundError(self._uri)
        commit = self._commit
        size, tag = self._try("looking up", relative, lambda: self._look_up(path, commit))
        return size, _version(commit, tag)

    def read_range(self, relative: str, start: int, length: int, version: str) -> bytes:
        """`length` bytes of a file in the commit that `version` names, from byte `start` on. Threads may share it."""
        path, commit = self._path(relative), json.loads(version)["commit"]
        refused: str | None = None

        def read() -> bytes:
            nonlocal refused
            address = self._address(path, commit, refused)
            try:
                return whole(_range(address, start, length), length)
            except PermissionError:
                if refused is not None:
                    raise
                refused = address  # It is signed, and expires after a while.
                return read()

        try:
            return self._try("reading", relative, read)
        except FileNotFoundError:
            raise FileReplaced(f"{self._uri}: {relative} is gone from its repository") from None

    @staticmethod
    def sha256(version: str) -> str | None:
        """The SHA-256 (hex) that the Hub keeps of a file; None for a small one, of which it keeps git's own digest."""
        found: str | None = json.loads(version).get("sha256")
        return found

    def _path(self, relative: str) -> str:
        return f"{self._folder}/{relative}".strip("/")

    def _look_up(self, path: str, commit: str) -> tuple[int, str | None]:
        """Bytes and ETag of a file, whose address is kept."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(self._repo, path, revision=commit))
        if found.size is None:
            raise OSError("the Hub does not say how large it is")
        self._addresses[path, commit] = found.location
        return found.size, found.etag

    def _address(self, path: str, commit: str, refused: str | None) -> str:
        """Where the bytes of a file are; not at `refused`, which has been tried."""
        with self._lock:
            if self._addresses.get((path, commit), refused) == refused:
                self._look_up(path, commit)
            return self._addresses[path, commit]

    @property
    def _commit(self) -> str:
        from huggingface_hub import HfApi

        if self._revision is not None and _COMMIT.fullmatch(self._revision):
            return self._revision
        asked = self._repo, self._revision
        if asked not in self._commits:
            # Without `expand`, the answer lists all files of the repository.
            info = self._try(
                "looking up", "", lambda: HfApi().model_info(self._repo, revision=self._revision, expand=["sha"])
            )
            self._commits[asked] = str(info.sha)
        return self._commits[asked]

    def _try(self, doing: str, relative: str, call: Callable[[], T]) -> T:
        """`call()`, whose errors are those by which RetryPolicy knows what may pass."""
        return self._retry(doing, relative, lambda: _with_os_errors(call))


def _version(commit: str, tag: str | None) -> str:
    """`tag`: the SHA-256 of a large file, or git's digest of a small one."""
    is_sha256 = tag is not None and len(tag) == _SHA256_DIGITS
    return json.dumps({"commit": commit, "sha256": tag if is_sha256 else None, "blob": None if is_sha256 else tag})


def _range(address: str, start: int, length: int) -> bytes:
    """What comes for a range of a file. Raises PermissionError for an address that is not valid any more."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

    # The token is the Hub's, and not that of the store to which it refers.
    own = urlsplit(address).netloc == urlsplit(constants.ENDPOINT).netloc
    headers = {
        **build_hf_headers(token=None if own else False),
        "Range": f"bytes={start}-{start + length - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return _with_os_errors(lambda: _streamed(get_session(), address, headers, timeout, start, length))


def _streamed(
    session: httpx.Client, address: str, headers: dict[str, str], timeout: float, start: int, length: int
) -> bytes:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented there

    with session.stream("GET", address, headers=headers, timeout=timeout) as answer:
        is_whole = answer.status_code == 200
        if is_whole and int(answer.headers.get("Content-Length", _MOST_WHOLE + 1)) > _MOST_WHOLE:
            raise OSError("a whole file comes where a range is asked for")
        content = answer.read()
        hf_raise_for_status(answer)
    return content[start : start + length] if is_whole else content


def _with_os_errors(call: Callable[[], T]) -> T:
    """`call()`, which raises the errors of huggingface_hub as OSErrors, in one line."""
    import httpx
    from huggingface_hub import errors

    try:
        return call()
    except errors.OfflineModeIsEnabled as error:
        raise PermissionError(_first_line(error)) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if isinstance(error, errors.EntryNotFoundError):
            raise FileNotFoundError(_first_line(error)) from None
        if isinstance(error, errors.GatedRepoError):
            raise OSError(
                f"the repository is gated: accept its terms on the Hub, and set HF_TOKEN (HTTP status {status})"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError):
            raise OSError(
                f"there is no such repository, or the token (HF_TOKEN) may not read it (HTTP status {status})"
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise OSError(f"the repository has no such revision (HTTP status {status})") from None
        kind = PermissionError if status in (401, 403) else OSError
        raise kind(f"{_first_line(error)} (HTTP status {status})") from None
    except httpx.HTTPError as error:
        raise OSError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
