"""Conditioning images as files: where a row may take them from, their bytes and their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.fs as pafs

from ltx_ray.storage.credentials import without_credentials
from ltx_ray.storage.locations import recorded, resolve, split_options
from ltx_ray.storage.pictures import InvalidImage, check_encodable, open_picture
from ltx_ray.storage.retry import StoreUnavailable
from ltx_ray.storage.store import Store

#: An image of more bytes is refused before it is decoded.
MAX_BYTES = 256 * 2**20
#: Seconds for which the store of a root is tried before a run begins.
_CHECK_SECONDS = 10.0


def check_roots(roots: Iterable[str]) -> None:
    """Raise ValueError unless each of `roots`, which are locations, is a local folder or a place in an object store.

    Raises ConnectionError when the object store does not answer: that is no fault of the root, nor of any row.
    """
    for root in roots:
        try:
            legal = _is_place(root) if "://" in root else os.path.isdir(root)
        except StoreUnavailable as error:
            raise ConnectionError(f"--image-root: {recorded(root)}, cannot be reached: {error}") from None
        if not legal:
            raise ValueError(f"--image-root: {recorded(root)}, legal: a folder, or a place such as s3://bucket/folder")


def _is_place(root: str) -> bool:
    """Whether there is such a store. Raises StoreUnavailable."""
    opened = False
    try:
        store = Store(root, _CHECK_SECONDS)
        opened = True
        store.exists("")
    except StoreUnavailable:
        raise
    except (OSError, ValueError):
        pass  # whoever may read the images need not be allowed to look their folder up
    return opened


def locate(path: str, folder: str, roots: Iterable[str]) -> str | None:
    """The location at which workers read an image that a row names, or None when it is below none of `roots`.

    Relative paths count from `folder`. Local links are resolved first. In an object store the key must literally begin
    with the root's; '..' (which a client may resolve) and options (which could name another server) are refused. The
    operator's options and credentials, those of the root, are added.
    """
    if "://" not in path or path[:5].lower() == "file:":
        try:
            location = resolve(path, split_options(folder and resolve(folder))[0])
        except ValueError:
            return None
    else:
        location = path
    if "://" not in location:
        full = os.path.realpath(location)
        return full if any(_holds(root, full) for root in roots) else None
    if "?" in location or {".", ".."} & set(location.split("/")):
        return None
    for root in roots:
        place, options = split_options(root)
        bare = without_credentials(place)
        for prefix in (place, bare):
            if "://" in root and location.startswith(prefix.rstrip("/") + "/"):
                return place + location.removeprefix(prefix) + options
    return None


def _holds(root: str, path: str) -> bool:
    """Whether the local `root` holds the resolved `path`."""
    top = resolve(root)
    return "://" not in top and os.path.commonpath([path, os.path.realpath(top)]) == os.path.realpath(top)


def read_image(path: str) -> bytes:
    """Bytes of the image at `path`, as `locate` gives it.

    Raises ValueError when there is no usable file, OSError when the store cannot be read.
    """
    try:
        store = Store(path)
        info = store.fs.get_file_info(store.root)
        if info.type == pafs.FileType.Directory:
            raise ValueError("no such file, but a folder")
        if info.type != pafs.FileType.File:
            raise ValueError("no such file")
        if info.size > MAX_BYTES:
            raise ValueError(f"{info.size} bytes, over the limit of {MAX_BYTES}")
        with store.fs.open_input_file(store.root) as file:
            return file.read()
    except FileNotFoundError:  # deleted since the lookup
        raise ValueError("no such file") from None
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None


def image_digest(path: str) -> str:
    """The first 32 hex digits of sha256 over the file's bytes."""
    return _inspected(path).digest


def check_image(path: str, crf: int) -> None:
    """Raise InvalidImage when the header of the image shows that it cannot be used at `crf`."""
    inspected = _inspected(path)
    if inspected.problem is not None:
        raise InvalidImage(inspected.problem)
    check_encodable(inspected.size, crf)


@dataclass(frozen=True)
class _Inspected:
    """What planning knows of an image: (width, height), or why it cannot be used."""

    digest: str
    size: tuple[int, int] = (0, 0)
    problem: str | None = None


@lru_cache(maxsize=4096)
def _inspected(path: str) -> _Inspected:
    """The image at `path`, read once. Cached: a manifest often names one image many times."""
    data = read_image(path)
    digest = hashlib.sha256(data).hexdigest()[:32]
    try:
        with open_picture(data) as picture:
            return _Inspected(digest, picture.size)
    except InvalidImage as error:
        return _Inspected(digest, problem=str(error))
