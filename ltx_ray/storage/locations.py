"""Paths and URIs that people give, and the places that they mean.

A location is an absolute local path, or a URI of an object store with pyarrow's options after a '?'.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from ltx_ray.storage.credentials import split_user_info, without_credentials

#: Schemes of object stores, in pyarrow's URIs.
SCHEMES = ("s3", "gs", "gcs")
_LEGAL = "legal: a path, s3:// or gs://"
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)
#: Where Ray unpacks the working directory of a job, below the folder of its session.
_COPIES = re.compile(r"(.*/runtime_resources/working_dir_files/[^/]+)(?:/(.*))?", re.DOTALL)

#: Elsewhere in the folder of a Ray session, such as ../../out in a job.
_SESSIONS = re.compile(r".*/session_\d{4}-\d\d-\d\d_[-_\d]+(?:/.*)?", re.DOTALL)


def resolve(path: str, folder: str | None = None) -> str:
    """The location that `path` means. Resolving it again changes nothing.

    `path` may begin with '~', be a file:// URL, and be relative to `folder` (a location; by default the working
    directory). Trailing slashes have no meaning. Links stay, because they may lead elsewhere on another node; only '..'
    follows them. Raises ValueError for what is no location.
    """
    if not path or "\0" in path:
        raise ValueError(f"{path!r}, names no place; {_LEGAL}")
    location = _resolve(path, folder)
    if not is_utf8(location):
        shown = location.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{shown}, is a name that is not UTF-8; legal: a name in UTF-8")
    return location


def is_utf8(name: str) -> bool:
    """Whether the bytes of a file's name were UTF-8. pyarrow opens no other."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve(path: str, folder: str | None) -> str:
    uri = _URI.fullmatch(path)
    scheme = uri.group(1).lower() if uri else ""
    if uri and scheme == "file":
        return _resolve_file_url(path)
    if uri and (scheme in SCHEMES or len(uri.group(2)) >= 2):
        return _resolve_uri(path, scheme, uri.group(2), uri.group(3))
    if re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        raise ValueError(f"{path}, is a Windows path; {_LEGAL}")
    if path.startswith("$"):
        raise ValueError(f"{path}, begins with a variable that no shell has replaced; {_LEGAL}")
    if folder is not None and "://" in folder and not path.startswith(("/", "~")):
        return join(folder, path)
    return _resolve_local(path, folder)


def _resolve_local(path: str, folder: str | None) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}, names no home directory that there is; legal: another path, or ./{path}")
    full = expanded if os.path.isabs(expanded) else os.path.join(folder or _working_directory(path), expanded)
    # '..' leads out of the folder that a link points to, as it does for the system.
    return os.path.realpath(full) if ".." in full.split("/") else "/" + os.path.abspath(full).lstrip("/")


def _working_directory(path: str) -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise ValueError(
            f"{path}, is relative to a working directory that was deleted; legal: an absolute path"
        ) from None


def _resolve_file_url(path: str) -> str:
    parts = urlsplit(path)
    if parts.netloc.lower() not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"{path}, names a host; legal: file:///absolute/path, or a path")
    return _resolve_local(unquote(path.partition(":")[2].removeprefix(f"//{parts.netloc}")), None)


def _resolve_uri(path: str, scheme: str, slashes: str, rest: str) -> str:
    if scheme not in SCHEMES:
        raise ValueError(f"{without_credentials(path)}: unsupported scheme; {_LEGAL}")
    inside = split_user_info(rest)[1].partition("?")[0].rstrip("/")
    if len(slashes) != 2 or not inside:
        raise ValueError(f"{without_credentials(path)}, names no bucket; legal: {scheme}://bucket/folder")
    if "//" in inside:
        raise ValueError(
            f"{without_credentials(path)}, has nothing between two slashes; legal: {scheme}://bucket/folder"
        )
    place, mark, options = rest.partition("?")
    scheme = "gs" if scheme == "gcs" else scheme
    return f"{scheme}://{place.rstrip('/')}{mark if options else ''}{options}"


def split_options(uri: str) -> tuple[str, str]:
    """A location without its options, and the options with their '?'. A local path has none."""
    if "://" not in uri:
        return uri, ""
    place, mark, options = uri.partition("?")
    return place, mark + options


def join(folder: str, name: str) -> str:
    """Location of `name` in `folder`, with the folder's options."""
    place, options = split_options(folder)
    return f"{place.rstrip('/')}/{name}{options}" if "://" in folder else os.path.join(folder, name)


def parent(uri: str) -> str:
    """Location of the folder that holds `uri`, with its options."""
    place, options = split_options(uri)
    return os.path.dirname(place) + options


def recorded(location: str) -> str:
    """`location` as datasets and messages have it, without credentials.

    A file in a job's copy of its working directory is named relative to the copy: each submission makes another copy,
    and the file is the same.
    """
    copy = _COPIES.fullmatch(location)
    return copy.group(2) or "." if copy else without_credentials(location)


def recorded_image(path: str) -> str:
    """An image's location as rows are recorded with it: without credentials, and without the options of its root."""
    return split_options(without_credentials(path))[0]


def is_in_job_copy(location: str) -> bool:
    """Whether a local path is in Ray's copy of a job's working directory, or elsewhere in the folder of a Ray session.

    That folder goes with the session.
    """
    paths = () if "://" in location else (location, os.path.realpath(location))
    return any(_COPIES.fullmatch(path) or _SESSIONS.fullmatch(path) for path in paths)
