"""Digests of weight files, and the cache that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

from ltx_ray.checkpoints.safetensors import MAX_HEADER_BYTES

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


def file_digest(path: str) -> str:
    """32 hex digits for a file: its size, its head and fixed samples of the rest.

    A 46 GB file takes some 4 MB of reading. Files up to that size are hashed whole.
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
    """`file_digest`, or for a directory the digest over its config, tokenizer and weight files.

    Cached by path, size and mtime under `cache_dir` (default: the ltx-ray cache).
    """
    if os.path.isdir(path):
        # a part of a model may be a link to a folder elsewhere
        inside = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(p for p in inside if p.suffix in (".safetensors", ".json", ".model") and p.is_file())
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(path)}:{cached_digest(str(file), cache_dir)}\n".encode())
        return digest.hexdigest()[:32]
    stat = os.stat(path)
    key = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
    folder = (cache_dir or cache_root()) / "digests"
    entry = folder / (hashlib.sha256(key[0].encode()).hexdigest()[:32] + ".json")
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
        pass  # a read-only home only costs the reading again
    return digest


def cache_root() -> Path:
    """$LTX_RAY_CACHE, or `ltx-ray` in the user's cache directory."""
    if explicit := os.environ.get("LTX_RAY_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx-ray"
