"""Folders of model files that this machine makes itself, once, in the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ltx_ray.checkpoints.digests import cache_root, writable_cache_root


def made_once(name: str, make: Callable[[Path], object], cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder `name` of the cache. `make(folder)` fills it on first use.

    `cache_dir` defaults to $LTX_RAY_CACHE, otherwise to `ltx-ray` in the user's cache directory. The folder is
    published by rename when it is complete, so any number of processes may call this at once, as long as they make the
    same bytes. Raises ValueError when nothing can be written to the default cache.
    """
    cache = cache_root() if cache_dir is None else Path(cache_dir)
    folder = cache / name
    if folder.is_dir():
        return folder
    if cache_dir is None:
        writable_cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        make(making)
        making.chmod(0o755)  # With the mode that mkdtemp sets, a shared cache would serve one user only.
        try:
            os.rename(making, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was first, with the same bytes.
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
