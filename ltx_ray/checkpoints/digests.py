"""Digests of weight files, and their cache."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ltx_ray.checkpoints.model_paths import files_below, identity, is_folder, is_remote, open_binary, read_ranges
from ltx_ray.checkpoints.model_paths import size as size_of
from ltx_ray.checkpoints.safetensors import MAX_HEADER_BYTES, read_header
from ltx_ray.config import NEWEST_SCHEME
from ltx_ray.storage.locations import join, split_options

#: Bytes at the beginning, in the middle and at the end of each tensor that a digest reads.
_TENSOR_SAMPLE_BYTES = 4096
#: Number and size of the samples of a file in the first scheme.
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
#: Bytes that are in memory at once.
_BLOCK_BYTES = 4 * 2**20


def file_digest(path: str, scheme: int = NEWEST_SCHEME) -> str:
    """32 hex digits of sha256 over a file's size and content, of which a safetensors file is sampled.

    Of each tensor the first, middle and last 4 KiB are read, so that a tensor that was trained or replaced is noticed:
    about 70 MB of a 46 GB file. Scheme 1 read 64 samples of 64 KiB of any file, between which whole tensors could lie.
    A file of up to 4 MiB is hashed whole in both.
    """
    size = size_of(path)
    digest = hashlib.sha256(str(size).encode())
    with open_binary(path) as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()[:32]
        samples = list(_spread_samples(path, file, size) if scheme == 1 else _tensor_samples(path))
        if is_remote(path):
            # One after the other, thousands of samples would take minutes.
            for block in read_ranges(path, samples):
                digest.update(block)
        else:
            for start, length in samples:
                _add(digest, file, start, length)
    return digest.hexdigest()[:32]


def _add(digest: hashlib._Hash, file: BinaryIO, start: int, length: int) -> None:
    # In pieces, because a file whose header is damaged is one sample.
    file.seek(start)
    while length > 0 and (block := file.read(min(length, _BLOCK_BYTES))):
        digest.update(block)
        length -= len(block)


def _spread_samples(path: str, file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the header and of samples at even distances."""
    length = struct.unpack("<Q", file.read(8))[0] if _suffix(path) == ".safetensors" else 0
    yield 0, 8 + min(length, MAX_HEADER_BYTES)
    for i in range(_SAMPLES):
        yield (size - _SAMPLE_BYTES) * i // (_SAMPLES - 1), _SAMPLE_BYTES


def _tensor_samples(path: str) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the header and of samples of each tensor, in the order of the file; all of another file.

    The content decides what the file is: a cache of models may hold it under a name without an ending.
    """
    try:
        tensors = sorted(read_header(path).tensors.values(), key=lambda info: info.start)
    except ValueError:
        tensors = []  # A tokenizer, or a damaged file in a folder of a model, which nothing loads.
    yield 0, min((info.start for info in tensors), default=size_of(path))
    for info in tensors:
        if info.nbytes <= 3 * _TENSOR_SAMPLE_BYTES:
            yield info.start, info.nbytes
        else:
            middle = info.start + (info.nbytes - _TENSOR_SAMPLE_BYTES) // 2
            for start in (info.start, middle, info.end - _TENSOR_SAMPLE_BYTES):
                yield start, _TENSOR_SAMPLE_BYTES


def cached_digest(path: str, cache_dir: Path | None = None, scheme: int = NEWEST_SCHEME) -> str:
    """`file_digest` of a file, or the digest over the config, tokenizer and weight files of a directory.

    It is cached in `cache_dir` (default: ltx-ray's cache directory) for as long as the file's path, size, inode, mtime
    and ctime stay; of a URI, its size and the store's version of it.
    """
    if is_folder(path):
        return _folder_digest(path, cache_dir, scheme)
    real_path, *state = identity(path)
    # The first scheme samples a file by the name that it is given, and a link may have another ending than its file.
    key = [scheme, real_path, *state, _suffix(path)]
    folder = (cache_dir or cache_root()) / "digests"
    entry = folder / (hashlib.sha256(f"{scheme} {real_path}".encode()).hexdigest()[:32] + ".json")
    try:
        stored = json.loads(entry.read_text())
        if stored["key"] == key:
            return stored["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_digest(path, scheme)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "digest": digest}))
        temporary.replace(entry)
    except OSError:
        pass  # without a writable cache the file is read again next time
    return digest


def _folder_digest(path: str, cache_dir: Path | None, scheme: int) -> str:
    digest = hashlib.sha256()
    for name in files_below(path):
        if _suffix(name) in (".safetensors", ".json", ".model"):
            digest.update(f"{name}:{cached_digest(join(path, name), cache_dir, scheme)}\n".encode())
    return digest.hexdigest()[:32]


def _suffix(path: str) -> str:
    return Path(split_options(path)[0]).suffix


def cache_root() -> Path:
    """$LTX_RAY_CACHE, or `ltx-ray` in the user's cache directory. Raises ValueError for a user without a home."""
    if explicit := os.environ.get("LTX_RAY_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(explicit)))
    try:
        caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
        # The standard has relative paths ignored.
        return Path(caches if os.path.isabs(caches) else Path.home() / ".cache") / "ltx-ray"
    except RuntimeError:
        raise ValueError(
            "LTX_RAY_CACHE: not set, and this user has no home directory; legal: a folder that can be written"
        ) from None


def writable_cache_root() -> Path:
    """`cache_root`, which exists now. Raises ValueError when nothing can be written there."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        raise ValueError(
            f"LTX_RAY_CACHE: {root}, cannot be written ({error.strerror}); legal: a folder that can be written"
        ) from None
