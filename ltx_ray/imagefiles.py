"""Conditioning images as files: reading them from any store, and the digest that stands for them."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import pyarrow as pa
import pyarrow.fs as pafs

from ltx_ray.storage import Store

#: An image larger than this is refused before it is decoded (bytes).
MAX_BYTES = 256 * 2**20


def read_image(path: str) -> bytes:
    """Bytes of the image at `path` (a local path or s3://, gs:// ...).

    Raises ValueError saying why it cannot be had.
    """
    try:
        store = Store(path)
        info = store.fs.get_file_info(store.root)
        if info.type != pafs.FileType.File:
            raise ValueError("no such file")
        if info.size > MAX_BYTES:
            raise ValueError(f"{info.size} bytes, over the limit of {MAX_BYTES}")
        with store.fs.open_input_file(store.root) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=4096)
def image_digest(path: str) -> str:
    """32 hex digits of sha256 over the file's bytes. A manifest often names one image many times."""
    return hashlib.sha256(read_image(path)).hexdigest()[:32]
