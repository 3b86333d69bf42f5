"""Checks of the cache folder's disk and of an output: room, rights, speed, and the clock."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ltx_ray.checkpoints.digests import writable_cache_root
from ltx_ray.doctor.checks import Check, Status, at_least
from ltx_ray.storage.locations import recorded
from ltx_ray.storage.store import Store

_MB, _GB = 10**6, 10**9
#: Bytes that are written to measure a disk, and a store.
_DISK_BYTES, _STORE_BYTES = 256 * _MB, 16 * _MB
#: Free GB: the released model with its text encoder takes 71.
_FREE_GB, _LEAST_FREE_GB = 100, 5
#: Megabytes a second: a replica that loads the model at the first takes a minute and a half.
_DISK_SPEED, _LEAST_DISK_SPEED = 500, 20
_STORE_SPEED, _LEAST_STORE_SPEED = 20, 0.5
#: Seconds by which a clock may be wrong. Object stores refuse requests that are 15 minutes off.
_CLOCK, _MOST_CLOCK = 5.0, 900.0


def cache_checks() -> Iterator[Check]:
    """The disk of $LTX_RAY_CACHE, where model files from URIs, digests and compiled kernels are kept."""
    folder = writable_cache_root()
    yield at_least(
        "cache space", shutil.disk_usage(folder).free / _GB, "GB free", _FREE_GB, _LEAST_FREE_GB,
        f"in {folder}, for models from URIs",
    )  # fmt: skip
    speed = _write_speed(folder, min(_DISK_BYTES, shutil.disk_usage(folder).free // 4))
    yield at_least("cache speed", speed, "MB/s written", _DISK_SPEED, _LEAST_DISK_SPEED, "as local NVMe disks do")


def _write_speed(folder: Path, nbytes: int) -> float:
    """Megabytes a second that reach the disk."""
    probe = folder / f"doctor-{secrets.token_hex(4)}"
    block = secrets.token_bytes(4 * _MB)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(max(1, nbytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return probe.stat().st_size / _MB / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)


def store_checks(output: str) -> Iterator[Check]:
    """A dataset's place: files can be made, read, listed and removed there, and nobody's is replaced by accident."""
    store = Store(output)
    name = f"_doctor-{secrets.token_hex(4)}"
    try:
        store.check_writable()
        yield Check("ok", "output rights", recorded(output), "files that can be made, read, listed and removed")
        data = secrets.token_bytes(_STORE_BYTES)
        wall, began = time.time(), time.perf_counter()
        store.write_bytes(name, data)
        wrote = time.perf_counter()
        stamp = store.modified(name)
        same = store.read_bytes(name) == data
        read = time.perf_counter()
        listed = name in store.list_names("")
        store.delete(name)
        once = store.refuses_second_create(name)
    except (OSError, ValueError) as error:
        yield Check("FAIL", "output rights", str(error), "files that can be made, read, listed and removed")
        return
    finally:
        _remove(store, name)
    if not (same and listed):
        fault = "a file that was written is not listed" if same else "a file reads otherwise than it was written"
        yield Check("FAIL", "output", fault, "a store that keeps what it is given, at once")
    for what, seconds in (("written", wrote - began), ("read", read - wrote)):
        speed = _STORE_BYTES / _MB / seconds
        yield at_least(
            f"output {what}", speed, f"MB/s {what}", _STORE_SPEED, _LEAST_STORE_SPEED, "for the clips of eight GPUs"
        )
    yield Check(
        "ok" if once else "warn", "output creation", "once" if once else "twice",
        "once, else two runs might write the same row: --single-writer",
    )  # fmt: skip
    yield _clock(stamp, wall, wall + wrote - began)


def _remove(store: Store, name: str) -> None:
    try:
        store.delete(name)
    except OSError:
        pass  # It may not be there, and whoever cannot remove is told so by what failed before.


def _clock(stamp: float, began: float, ended: float) -> Check:
    """The store's clock, which has stamped a file that was written between two times of this node's clock."""
    off = min(0.0, stamp - began) + max(0.0, stamp - ended)
    status: Status = "ok" if abs(off) <= _CLOCK else "warn" if abs(off) < _MOST_CLOCK else "FAIL"
    return Check(status, "clock", f"the store's is {off:+.1f} s off", "within 5 s; requests 15 min off are refused")
