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

from ltx_ray.checkpoints.safetensors import MAX_HEADER_BYTES, read_header
from ltx_ray.config import NEWEST_SCHEME

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
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        elif scheme == 1:
            for start, length in _spread_samples(path, file, size):
                _add(digest, file, start, length)
        else:
            for start, length in _tensor_samples(path):
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
    length = struct.unpack("<Q", file.read(8))[0] if path.endswith(".safetensors") else 0
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
    yield 0, min((info.start for info in tensors), default=os.path.getsize(path))
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
    and ctime stay. A program can set the mtime, and copies keep it, but the ctime is the system's.
    """
    if os.path.isdir(path):
        return _folder_digest(path, cache_dir, scheme)
    stat, real_path = os.stat(path), os.path.realpath(path)
    # The first scheme samples a file by the name that it is given, and a link may have another ending than its file.
    key = [scheme, real_path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, Path(path).suffix]
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
    # followlinks: a component of a model may be a link to a folder elsewhere
    inside = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    files = sorted(p for p in inside if p.suffix in (".safetensors", ".json", ".model") and p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}:{cached_digest(str(file), cache_dir, scheme)}\n".encode())
    return digest.hexdigest()[:32]


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
