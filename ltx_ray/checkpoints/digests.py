"""Digests of weight files, and their cache."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

from ltx_ray.checkpoints.safetensors import MAX_HEADER_BYTES

#: Number and size of the samples.
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


def file_digest(path: str) -> str:
    """32 hex digits of sha256 over a file's size, its header and fixed samples of the rest.

    About 4 MiB of a 46 GB file are read. A file of up to 4 MiB is hashed whole.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if path.endswith(".safetensors") else 0
            digest.update(head + file.read(min(length, MAX_HEADER_BYTES)))
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def cached_digest(path: str, cache_dir: Path | None = None) -> str:
    """`file_digest` of a file, or the digest over the config, tokenizer and weight files of a directory.

    It is cached by path, size and mtime in `cache_dir` (default: ltx-ray's cache directory).
    """
    if os.path.isdir(path):
        return _folder_digest(path, cache_dir)
    stat, real_path = os.stat(path), os.path.realpath(path)
    key = [real_path, stat.st_size, stat.st_mtime_ns]
    folder = (cache_dir or cache_root()) / "digests"
    entry = folder / (hashlib.sha256(real_path.encode()).hexdigest()[:32] + ".json")
    try:
        stored = json.loads(entry.read_text())
        if stored["key"] == key:
            return stored["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_digest(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "digest": digest}))
        temporary.replace(entry)
    except OSError:
        pass  # without a writable cache the file is read again next time
    return digest


def _folder_digest(path: str, cache_dir: Path | None) -> str:
    # followlinks: a component of a model may be a link to a folder elsewhere
    inside = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    files = sorted(p for p in inside if p.suffix in (".safetensors", ".json", ".model") and p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}:{cached_digest(str(file), cache_dir)}\n".encode())
    return digest.hexdigest()[:32]


def cache_root() -> Path:
    """$LTX_RAY_CACHE, or `ltx-ray` in the user's cache directory. Raises ValueError for a user without a home."""
    if explicit := os.environ.get("LTX_RAY_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(explicit)))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx-ray"
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
